"""In place of steps 2 and 3."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rlhf.config.checks import positive
from rlhf.config.data import DataConfig
from rlhf.config.training import OptimizerConfig


@dataclass(frozen=True)
class DPOConfig:
    """Direct preference optimisation, in place of reward model and PPO: arXiv 2305.18290."""

    data: DataConfig = field(default_factory=DataConfig)
    """Preference pairs."""
    model_path: str | None = None
    """The policy to start from, also the reference; default: the SFT model in the output folder."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """DPO's, or that of IPO (arXiv 2310.12036), which aims at a margin of 1 / (2 beta) nats."""
    beta: float = 0.1
    """How strongly the policy is held to the reference."""
    label_smoothing: float = 0.0
    """Probability that a pair is labelled the wrong way round (sigmoid)."""
    epochs: int = 1
    """Passes over the data."""
    batch_size: int = 32
    """Pairs in an optimizer step."""
    micro_batch_size: int = 16
    """Pairs in a forward pass; memory, not results, depends on it."""
    max_new_tokens: int = 128
    """Longest response in the evaluation of the report."""
    eval_steps: int | None = None
    """Optimizer steps between evaluations on held-out rows; default: an epoch."""
    keep_best: bool = True
    """Keep the weights of the lowest held-out loss; false: the last."""

    def __post_init__(self) -> None:
        positive(
            self, "beta", "epochs", "batch_size", "micro_batch_size", "max_new_tokens", "eval_steps"
        )
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if self.label_smoothing and self.loss == "ipo":
            raise ValueError("label_smoothing is for the loss sigmoid; ipo has none")
