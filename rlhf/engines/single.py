"""Training on one device with plain torch: AdamW, clipping, a schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf.config import OptimizerConfig

ADAM_EPS = 1e-5  # "The 37 implementation details of PPO", no. 3
ADAM_BETAS = (0.9, 0.95)
FINAL_FRACTION = 0.1  # of the highest learning rate, at the end of the schedule


@dataclass(frozen=True)
class StepInfo:
    """One optimizer step."""

    learning_rate: float
    grad_norm: float  # before clipping


class SingleProcessEngine:
    """A module with its optimizer. `backward` as often as there are micro-batches, then `step`.

    The optimizer moves fp32 masters: at a learning rate near 1e-6 weights of fewer bits would round
    every step away. fp32 weights are their own masters.
    """

    def __init__(self, module: nn.Module, config: OptimizerConfig, *, total_steps: int) -> None:
        self.module = module
        self._max_grad_norm = config.max_grad_norm
        self._weights = [p for p in module.parameters() if p.requires_grad]
        self._masters = [_master(weight) for weight in self._weights]
        self._optimizer = torch.optim.AdamW(
            _parameter_groups(self._masters, config.weight_decay),
            lr=config.learning_rate,
            betas=ADAM_BETAS,
            eps=ADAM_EPS,
            fused=True,
        )
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: learning_rate_factor(step, total_steps, config)
        )

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> StepInfo:
        """Clip, update, clear the gradients, advance the schedule.

        Raises ValueError, and leaves the weights alone, when the gradient is not finite.
        """
        for weight, master in self._halves():
            master.grad = None if weight.grad is None else weight.grad.float()
        norm = float(nn.utils.clip_grad_norm_(self._masters, self._max_grad_norm))
        if not math.isfinite(norm):
            raise ValueError(
                f"training has diverged, the gradient's norm is {norm}: lower the learning rate"
            )
        learning_rate = float(self._schedule.get_last_lr()[0])
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._schedule.step()
        with torch.no_grad():
            for weight, master in self._halves():
                weight.copy_(master)
                weight.grad = None
        return StepInfo(learning_rate, norm)

    def _halves(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Weights of fewer than 32 bits with their masters."""
        pairs = zip(self._weights, self._masters, strict=True)
        return [(weight, master) for weight, master in pairs if weight is not master]


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


def _master(weight: nn.Parameter) -> nn.Parameter:
    if weight.dtype == torch.float32:
        return weight
    return nn.Parameter(weight.detach().float())


def _parameter_groups(
    parameters: list[nn.Parameter], weight_decay: float
) -> list[dict[str, object]]:
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
