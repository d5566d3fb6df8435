"""The optimizer's constants, groups and learning rate: the same under every engine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from rlhf.config import OptimizerConfig

ADAM_EPS = 1e-5  # "The 37 implementation details of PPO", no. 3
ADAM_BETAS = (0.9, 0.95)
FINAL_FRACTION = 0.1  # of the highest learning rate, at the end of the schedule


def learning_rate_factor(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """The share of the highest learning rate at a step, counted from 0."""
    warmup = round(config.warmup_fraction * total_steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if config.schedule == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    fall = 0.5 * (1 - math.cos(math.pi * progress)) if config.schedule == "cosine" else progress
    return 1 - (1 - FINAL_FRACTION) * fall


def parameter_groups(
    parameters: Sequence[nn.Parameter], weight_decay: float
) -> list[dict[str, Any]]:
    """Matrices with weight decay, the rest without."""
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
