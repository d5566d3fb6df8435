"""What is timed on a GPU: an op and the plain PyTorch expression of it, in bf16.

`large` cases work beyond the L2 cache, where the share of the copy bandwidth says how good a
memory-bound kernel is; the others are decode shapes, where the time does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.timing import error_and_bound

BF16 = torch.bfloat16
EPS = 1e-5
LARGE_ROWS, HIDDEN = 65536, 4096  # 512 MiB in bf16
HEADS, KV_HEADS, HEAD_DIM, BLOCK = 32, 8, 128, 16
DECODE_BATCHES = (1, 32)


@dataclass(frozen=True)
class Place:
    """Where cases are made, and by how much their sizes are divided: tests make small ones."""

    device: str = "cuda"
    shrink: int = 1

    def size(self, full: int) -> int:
        return max(1, full // self.shrink)

    def randn(self, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.randn(*shape, device=self.device).to(dtype)

    def arange(self, count: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.arange(count, dtype=dtype, device=self.device)

    def shapes(self) -> Iterator[tuple[str, int, bool]]:
        """Label, rows and whether they are beyond the L2 cache."""
        for batch in DECODE_BATCHES:
            yield f"B{batch}", batch, False
        yield "large", self.size(LARGE_ROWS), True


@dataclass(frozen=True)
class Case:
    """`ours` and `plain` take `args`; `result` is the tensor of what they return to compare."""

    op: Any
    label: str
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    args: tuple[Any, ...]
    bytes: int = 0  # read or written once by an ideal implementation
    large: bool = False
    flops: int = 0
    result: Callable[[Any], Tensor] = lambda out: out

    @property
    def name(self) -> str:
        return f"{self.op.name}-{self.label}"

    def check(self) -> tuple[float, float]:
        """Largest error, and the largest allowed: against `plain` in a wider type."""
        truth = self.result(self.plain(*map(widen, self.args))).clone()
        baseline = self.result(self.plain(*self.args)).clone()
        return error_and_bound(self.result(self.ours(*self.args)), baseline, truth)


def widen(x: Any) -> Any:
    """bf16 to fp32, fp32 to fp64."""
    wider = {BF16: torch.float32, torch.float32: torch.float64}
    return x.to(wider.get(x.dtype, x.dtype)) if isinstance(x, Tensor) else x


def size(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def joined(out: Any) -> Tensor:
    """All that an op returns, as one row."""
    return torch.cat([tensor.flatten() for tensor in out])
