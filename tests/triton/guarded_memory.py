"""Launchers run between guards: poison around every input and output finds bad addresses.

A load past an input brings NaN (or an illegal index) into the result; a store past an output
changes the number in the guard beside it, even if it stores that NaN; what a kernel forgets to
write stays NaN.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

GUARD = 1024  # elements on either side
CANARY = -12345.0  # what lies beside an output
_EMPTY = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
_FILLED = {"zeros", "zeros_like", "new_zeros", "full", "full_like", "new_full"}


class GuardedMemory(TorchDispatchMode):
    """Tensors made inside lie between guards."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[tuple[Tensor, Tensor]] = []  # and what their guards hold

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name in _EMPTY | _FILLED:
            return self.between_guards(result, CANARY, keep=name in _FILLED)
        return result

    def between_guards(self, x: Tensor, guard: float, keep: bool = True) -> Tensor:
        """A tensor like x, strides too, between guards; with its values if `keep`, or poison."""
        overlaps = any(s == 0 and n > 1 for n, s in zip(x.shape, x.stride(), strict=True))
        if overlaps or not x.numel():
            return x
        span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        buffer = torch.full((span + 2 * GUARD,), _fitting(guard, x.dtype), dtype=x.dtype)
        self.buffers.append((buffer, buffer[0].clone()))
        inside = buffer.as_strided(x.shape, x.stride(), GUARD)
        return inside.copy_(x) if keep else inside.fill_(_fitting(torch.nan, x.dtype))

    def check(self) -> None:
        for buffer, guard in self.buffers:
            for side in (buffer[:GUARD], buffer[-GUARD:]):
                intact = side.isnan() if guard.isnan() else side == guard
                assert intact.all(), f"a kernel wrote outside a tensor of {buffer.dtype}"


def _fitting(number: float, dtype: torch.dtype) -> float | int:
    return number if dtype.is_floating_point else torch.iinfo(dtype).min


def guarded(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """The launcher, on inputs and outputs between guards, which must be intact afterwards."""

    @functools.wraps(launcher)
    def launch(*args: Any) -> Any:
        memory = GuardedMemory()
        args = tuple(
            memory.between_guards(x, torch.nan) if isinstance(x, Tensor) else x for x in args
        )
        with memory:
            result = launcher(*args)
        memory.check()
        return tree_map(torch.clone, result)

    return launch
