"""A moving average of a model's weights, in fp32."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class MovingAverage:
    """average = decay * average + (1 - decay) * weight, of every parameter that trains.

    In fp32 whatever the model's type: in 16 bits a small (1 - decay) * difference rounds to
    nothing, and the average never moves.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self._model = model
        self._decay = decay
        self.weights: dict[str, Tensor] = {
            name: parameter.detach().float().clone()
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }

    @torch.no_grad()
    def update(self) -> None:
        """After an optimizer step."""
        for name, parameter in self._model.named_parameters():
            if name in self.weights:
                self.weights[name].lerp_(parameter.float(), 1 - self._decay)

    @contextlib.contextmanager
    @torch.no_grad()
    def applied(self) -> Iterator[None]:
        """Within the block the model has the averaged weights, rounded to its type."""
        parameters = {n: p for n, p in self._model.named_parameters() if n in self.weights}
        own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        for name, parameter in parameters.items():
            parameter.copy_(self.weights[name])
        try:
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.copy_(own[name])
