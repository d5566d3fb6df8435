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


class SingleProcessEngine(PlainEngine):
    """A module with its optimizer. `backward` as often as there are micro-batches, then `step`.

    The optimizer moves fp32 masters: at a learning rate near 1e-6 weights of fewer bits would round
    every step away. fp32 weights are their own masters.
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

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> StepInfo:
        """Clip, update, clear the gradients, advance the schedule.

        Raises ValueError, and leaves the weights alone, when the gradient is not finite.
        """
        for weight, master in self._halves():
            master.grad = None if weight.grad is None else weight.grad.float()
        masters = list(self._masters.values())
        norm = float(nn.utils.clip_grad_norm_(masters, self._config.max_grad_norm))
        check_finite(norm)
        factor = learning_rate_factor(self._steps, self._total_steps, self._config)
        learning_rate = self._config.learning_rate * factor
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._steps += 1
        with torch.no_grad():
            for weight, master in self._halves():
                weight.copy_(master)
                weight.grad = None
        return StepInfo(learning_rate, norm)

    def save(self, folder: Path) -> None:
        """Weights that are not trained stay out: they are where the model came from."""
        state = {
            "steps": self._steps,
            "masters": {name: master.detach() for name, master in self._masters.items()},
            "optimizer": self._optimizer.state_dict(),
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
        self._steps = state["steps"]

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
