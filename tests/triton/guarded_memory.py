"""Launchers run between guards: poison around every input and output finds bad addresses.

A load past an input brings NaN (or an illegal index) into the result; a store past any tensor
changes the guard beside it, which is looked at after the launch; what a kernel forgets to write
stays NaN.
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
_EMPTY = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}
_FILLED = {"zeros", "zeros_like", "new_zeros", "full", "full_like", "new_full"}


class GuardedMemory(TorchDispatchMode):
    """Tensors made inside lie between guards."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if name in _EMPTY | _FILLED:
            return self.between_guards(result, keep=name in _FILLED)
        return result

    def between_guards(self, x: Tensor, keep: bool) -> Tensor:
        """A tensor like x, strides too, in a poisoned buffer; with its values if `keep`."""
        overlaps = any(s == 0 and n > 1 for n, s in zip(x.shape, x.stride(), strict=True))
        if overlaps or not x.numel():
            return x
        span = 1 + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        buffer = torch.full((span + 2 * GUARD,), _poison(x.dtype), dtype=x.dtype)
        self.buffers.append(buffer)
        inside = buffer.as_strided(x.shape, x.stride(), GUARD)
        return inside.copy_(x) if keep else inside

    def check(self) -> None:
        for buffer in self.buffers:
            for guard in (buffer[:GUARD], buffer[-GUARD:]):
                intact = (
                    guard.isnan() if guard.is_floating_point() else guard == _poison(buffer.dtype)
                )
                assert intact.all(), f"a kernel wrote outside a tensor of {buffer.dtype}"


def _poison(dtype: torch.dtype) -> float | int:
    return torch.nan if dtype.is_floating_point else torch.iinfo(dtype).min


def guarded(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """The launcher, on inputs and outputs between guards, which must be intact afterwards."""

    @functools.wraps(launcher)
    def launch(*args: Any) -> Any:
        memory = GuardedMemory()
        args = tuple(
            memory.between_guards(x, keep=True) if isinstance(x, Tensor) else x for x in args
        )
        with memory:
            result = launcher(*args)
        memory.check()
        return tree_map(torch.clone, result)

    return launch
