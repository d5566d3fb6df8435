"""Linear layers of few rows, with and without adapters."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.case import EVERYWHERE, HIDDEN, Case, Sweeps, copies, randn, size
from hybrid_engine import ops


def skinny_linear(batch: int, hidden: int, dtype: torch.dtype) -> Case:
    weight_bytes = hidden * hidden * dtype.itemsize
    cold = hidden >= 4096
    operands = [
        (randn(batch, hidden, dtype=dtype), randn(hidden, hidden, dtype=dtype))
        for _ in range(copies(weight_bytes, cold))
    ]
    return Case("skinny_linear", ops.skinny_linear, F.linear, operands, weight_bytes, cold=cold)


def fused_lora(batch: int, hidden: int, dtype: torch.dtype) -> Case:
    x, weight = randn(batch, hidden, dtype=dtype), randn(hidden, hidden, dtype=dtype)
    a, b = randn(16, hidden, dtype=dtype), randn(hidden, 16, dtype=dtype)

    def ours(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return ops.fused_lora(x, weight, None, [a], [b], [2.0])

    def plain(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, weight) + F.linear(F.linear(x, a), b) * 2.0

    return Case("fused_lora", ours, plain, [(x, weight, a, b)], size(weight, a, b))


SWEEPS: Sweeps = {skinny_linear: ((1, 8, 16), HIDDEN), fused_lora: EVERYWHERE}
