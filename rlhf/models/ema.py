"""A moving average of a model's weights, in fp32."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf import distributed

STATE = "state.pt"


class MovingAverage:
    """average = decay * average + (1 - decay) * weight, of every parameter that trains.

    In fp32 whatever the model's type: in 16 bits a small (1 - decay) * difference rounds to
    nothing, and the average never moves. Each rank keeps its part of every weight, and with
    `offload` in the CPU's memory; only `weights` brings the parts together.
    """

    def __init__(self, model: nn.Module, *, decay: float, offload: bool = False) -> None:
        self._decay = decay
        self._parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._parts = {}
        for name, parameter in self._parameters.items():
            device = torch.device("cpu") if offload else parameter.device
            self._parts[name] = _part(parameter).to(device, torch.float32, copy=True)

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step."""
        for name, part in self._parts.items():
            ours = _part(self._parameters[name]).to(part.device, torch.float32)
            part.lerp_(ours, 1 - self._decay)

    def weights(self) -> dict[str, Tensor]:
        """The averages in fp32 in the CPU's memory of the first rank, {} on the others."""
        whole = {}
        for name, parameter in self._parameters.items():
            shape = getattr(parameter, "ds_shape", parameter.shape)
            found = _whole(self._parts[name].to(parameter.device), shape)
            if distributed.is_first():
                whole[name] = found.cpu()
        return whole

    def save(self, folder: Path) -> None:
        """All ranks together; the first one writes."""
        weights = self.weights()
        if distributed.is_first():
            torch.save(weights, folder / STATE)

    def load(self, folder: Path) -> None:
        """On any number of ranks. Raises ValueError for the average of another model."""
        saved: dict[str, Tensor] = torch.load(folder / STATE, weights_only=True, mmap=True)
        shapes: dict[str, Any] = {
            n: tuple(getattr(p, "ds_shape", p.shape)) for n, p in self._parameters.items()
        }
        if shapes != {name: tuple(weight.shape) for name, weight in saved.items()}:
            raise ValueError(f"{folder} is the moving average of another model")
        for name, part in self._parts.items():
            ours = _share(saved[name])
            part[: len(ours)].copy_(ours)


def _part(parameter: nn.Parameter) -> Tensor:
    """This rank's consecutive part of a parameter, flat. ZeRO 3 has it divided in just this way."""
    if hasattr(parameter, "ds_tensor"):
        return parameter.ds_tensor.detach()
    return _share(parameter.detach())


def _share(whole: Tensor) -> Tensor:
    size = math.ceil(whole.numel() / distributed.world_size())
    start = distributed.rank() * size
    return whole.flatten()[start : start + size]


def _whole(part: Tensor, shape: torch.Size) -> Tensor:
    """What the ranks' parts, the last one padded or shorter, are parts of."""
    numel = math.prod(shape)
    size = math.ceil(numel / distributed.world_size())
    padded = nn.functional.pad(part[:size], (0, size - len(part[:size])))
    return distributed.gather(padded).flatten()[:numel].view(shape)
