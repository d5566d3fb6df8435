"""Training on one device with plain torch: AdamW, clipping, a schedule."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.config import OptimizerConfig
from rlhf.engines.interface import PlainEngine, StepInfo
from rlhf.engines.schedule import ADAM_BETAS, ADAM_EPS, learning_rate_factor, parameter_groups

STATE_FILE = "state.pt"
FIRST_LOSS_SCALE = 2.0**16  # of fp16
LOSS_SCALE_WINDOW = 2000  # steps without an overflow after which the scale is doubled


class SingleProcessEngine(PlainEngine):
    """A module with its optimizer. `backward` as often as there are micro-batches, then `step`.

    The optimizer moves fp32 masters: at a learning rate near 1e-6 weights of fewer bits would round
    every step away. fp32 weights are their own masters. In fp16 small gradients would vanish, so
    losses are scaled up before the backward pass, and gradients down after it.
    """

    def __init__(self, module: nn.Module, config: OptimizerConfig, *, total_steps: int) -> None:
        super().__init__(module)
        self._config = config
        self._total_steps = total_steps
        self._steps = 0  # taken
        self._weights = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._masters = {name: _master(weight) for name, weight in self._weights.items()}
        self._optimizer = torch.optim.AdamW(
            parameter_groups(list(self._masters.values()), config.weight_decay),
            lr=config.learning_rate,
            betas=ADAM_BETAS,
            eps=ADAM_EPS,
            fused=True,
        )
        kinds = {(weight.dtype, weight.device.type) for weight in module.parameters()}
        halves = [device for dtype, device in kinds if dtype == torch.float16]
        self._scaler = torch.amp.GradScaler(
            halves[0] if halves else "cpu", init_scale=FIRST_LOSS_SCALE,
            growth_interval=LOSS_SCALE_WINDOW, enabled=bool(halves),
        )  # fmt: skip
        self._skipped_steps = 0

    def backward(self, loss: Tensor) -> None:
        self._scaler.scale(loss).backward()

    def step(self) -> StepInfo:
        """Clip, update, clear the gradients, advance the schedule.

        Raises ValueError, and leaves the weights alone, when the gradient is not finite; fp16 has
        another try, at half the loss scale, in the next step.
        """
        for weight, master in self._halves():
            master.grad = None if weight.grad is None else weight.grad.float()
        masters = list(self._masters.values())
        self._scaler.unscale_(self._optimizer)
        norm = float(nn.utils.clip_grad_norm_(masters, self._config.max_grad_norm))
        if not self._scaler.is_enabled():
            check_finite(norm)
        factor = learning_rate_factor(self._steps, self._total_steps, self._config)
        learning_rate = self._config.learning_rate * factor
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._scaler.step(self._optimizer)  # not where a gradient is not finite
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=True)
        self._steps += 1
        with torch.no_grad():
            for weight, master in self._halves():
                weight.copy_(master)
                weight.grad = None
        return self._info(learning_rate, norm)

    def save(self, folder: Path) -> None:
        """Weights that are not trained stay out: they are where the model came from."""
        state = {
            "steps": self._steps,
            "masters": {name: master.detach() for name, master in self._masters.items()},
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "skipped_steps": self._skipped_steps,
        }
        torch.save(state, folder / STATE_FILE)

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        """Raises ValueError where the state is of another model, and leaves this one alone."""
        state: dict[str, Any] = torch.load(folder / STATE_FILE, weights_only=True)
        check_same_weights(self._masters, state["masters"], folder)
        for name, master in self._masters.items():
            master.copy_(state["masters"][name])
            self._weights[name].copy_(master)
        self._optimizer.load_state_dict(state["optimizer"])
        self._steps, self._skipped_steps = state["steps"], state["skipped_steps"]
        if self._scaler.is_enabled():
            self._scaler.load_state_dict(state["scaler"])

    def _info(self, learning_rate: float, norm: float) -> StepInfo:
        if not self._scaler.is_enabled():
            return StepInfo(learning_rate, norm)
        if not math.isfinite(norm):
            norm = math.inf
            self._skipped_steps += 1
            check_scale(self._scaler.get_scale())
        return StepInfo(learning_rate, norm, self._scaler.get_scale(), self._skipped_steps)

    def _halves(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """Weights of fewer than 32 bits with their masters."""
        pairs = ((weight, self._masters[name]) for name, weight in self._weights.items())
        return [(weight, master) for weight, master in pairs if weight is not master]


def check_finite(norm: float) -> None:
    """Raises ValueError for the norm of a gradient that would ruin the weights."""
    if not math.isfinite(norm):
        raise ValueError(
            f"training has diverged, the gradient's norm is {norm}: lower the learning rate"
        )


def check_scale(loss_scale: float) -> None:
    """After a gradient that overflowed. Raises ValueError when no smaller loss scale will help."""
    if loss_scale <= 1:
        raise ValueError(
            "training has diverged, the gradient overflows fp16 at any loss scale: lower the "
            "learning rate, or take model.dtype bfloat16"
        )


def check_same_weights(
    ours: dict[str, nn.Parameter], saved: dict[str, Tensor], folder: Path
) -> None:
    """Raises ValueError unless names and shapes agree."""
    shapes = {name: tuple(weight.shape) for name, weight in ours.items()}
    found = {name: tuple(weight.shape) for name, weight in saved.items()}
    if different := sorted(n for n in shapes | found if shapes.get(n) != found.get(n)):
        name = different[0]
        raise ValueError(
            f"{folder} is a checkpoint of another model: {name} is {found.get(name)} there and "
            f"{shapes.get(name)} here ({len(different)} weights differ)"
        )


def _master(weight: nn.Parameter) -> nn.Parameter:
    if weight.dtype == torch.float32:
        return weight
    return nn.Parameter(weight.detach().float())
