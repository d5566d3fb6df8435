"""What a trainer asks of an engine, whatever carries it out."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Concatenate, ParamSpec, Protocol, TypeVar

from torch import Tensor, nn

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class StepInfo:
    """One optimizer step."""

    learning_rate: float
    grad_norm: float  # before clipping; infinite where fp16 made the step be skipped
    loss_scale: float | None = None  # of the next backward passes; None but in fp16
    skipped_steps: int = 0  # so far, because the gradient overflowed at its loss scale

    @property
    def is_skipped(self) -> bool:
        return not math.isfinite(self.grad_norm)

    def metrics(self, prefix: str = "") -> dict[str, float]:
        """All but the learning rate, by name."""
        found = {} if self.is_skipped else {f"{prefix}grad_norm": self.grad_norm}
        if self.loss_scale is not None:
            found[f"{prefix}loss_scale"] = self.loss_scale
            found[f"{prefix}skipped_steps"] = float(self.skipped_steps)
        return found


class Engine(Protocol):
    """A module, and how to compute with it while its weights may be spread over ranks.

    `engine(function, *args)` is `function(module, *args)` with every weight in reach. Ranks that
    share a model call it together, with the same function.
    """

    module: nn.Module

    def __call__(
        self, function: Callable[Concatenate[nn.Module, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R: ...

    def gathered(self) -> AbstractContextManager[None]:
        """Inside, the module itself has all its weights, as if it were on one process."""
        ...

    def for_rollout(self) -> AbstractContextManager[None]:
        """Inside, a HybridEngine on the module generates, wherever the weights lie."""
        ...

    def editing(self, parameters: Sequence[nn.Parameter]) -> AbstractContextManager[None]:
        """Inside, these parameters are whole; what is written into them stays.

        The copies that an optimizer keeps do not follow: for a model that is trained no further.
        """
        ...

    def weights(self) -> dict[str, Tensor]:
        """The module's whole state_dict on the first rank, {} on the others."""
        ...


class TrainingEngine(Engine, Protocol):
    """A module with its optimizer. `backward` for each micro-batch, then `step`.

    A loss is this rank's part of a sum: engines add the ranks' gradients up, and divide by nothing.
    """

    def backward(self, loss: Tensor) -> None: ...

    def step(self) -> StepInfo:
        """Clip, update, clear the gradients, advance the schedule.

        In fp16 a step whose gradient overflows is skipped, and the loss scale halved for the next.
        Raises ValueError when the gradient is not finite, in fp16 at any scale.
        """
        ...

    def save(self, folder: Path) -> None:
        """Write what training has changed: weights, optimizer, place in the schedule."""
        ...

    def load(self, folder: Path) -> None:
        """Go on from what `save` wrote, bit for bit. Raises ValueError where it does not fit."""
        ...


class PlainEngine:
    """A module that is whole on every rank."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(
        self, function: Callable[Concatenate[nn.Module, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        return function(self.module, *args, **kwargs)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def for_rollout(self) -> Iterator[None]:
        yield

    @contextlib.contextmanager
    def editing(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        yield

    def weights(self) -> dict[str, Tensor]:
        return self.module.state_dict()
