"""What a benchmark of an op times: two functions, the operands of both, and their check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

BATCHES, HIDDEN = (1, 8, 32), (288, 1024, 4096)  # of decode steps
EVERYWHERE = (BATCHES, HIDDEN)
COLD_BYTES = 800 << 20  # operands of a cold case, all copies: beyond any cache


@dataclass
class Case:
    """One shape of one op. `operands` are tuples of arguments, used in turn."""

    op: str
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    operands: list[tuple[Any, ...]]
    bytes: int
    comparable: Callable[[Any, tuple[Any, ...]], Any] = field(default=lambda out, args: out)
    cold: bool = False


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def size(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def heads_of(hidden: int) -> tuple[int, int, int]:
    """Heads, kv heads, head dim of a model of this width."""
    head_dim = 48 if hidden == 288 else 64 if hidden < 2048 else 128
    return hidden // head_dim, max(1, hidden // head_dim // 4), head_dim


def copies(bytes_of_one: int, cold: bool) -> int:
    return -(-COLD_BYTES // bytes_of_one) if cold else 1


def widened(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)


def copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in args)


def assert_correct(case: Case) -> None:
    """At most twice the error of the expression, or one rounding of the largest result."""
    results = []
    for function, prepare in ((case.ours, copied), (case.plain, copied), (case.plain, widened)):
        args = prepare(case.operands[0])
        results.append(case.comparable(function(*args), args))
    ours, plain, truth = results
    if ours.dtype == torch.bool:
        assert ours.all()
        return
    error, allowed = ((x.double() - truth).abs().max().item() for x in (ours, plain))
    rounding = torch.finfo(ours.dtype).eps * truth.abs().max().item()
    assert error <= max(2 * allowed, rounding), f"{case.op}: error {error:.3g}, torch {allowed:.3g}"


# Which cases there are: the function that makes one, its batches and its widths.
Sweeps = dict[Callable[..., Case], tuple[tuple[int, ...], tuple[int, ...]]]
