"""Activations, gated and biased."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.case import EVERYWHERE, Case, Sweeps, randn, size
from hybrid_engine import ops


def silu_and_mul(batch: int, hidden: int, dtype: torch.dtype) -> Case:
    x = randn(batch, 2 * (hidden * 8 // 3), dtype=dtype)

    def plain(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    return Case("silu_and_mul", ops.silu_and_mul, plain, [(x,)], size(x) * 3 // 2)


def gelu_and_mul(batch: int, hidden: int, dtype: torch.dtype) -> Case:
    x = randn(batch, 2 * (hidden * 8 // 3), dtype=dtype)

    def plain(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.gelu(gate, approximate="tanh") * up

    ours = lambda x: ops.gelu_and_mul(x, True)  # noqa: E731
    return Case("gelu_and_mul", ours, plain, [(x,)], size(x) * 3 // 2)


def bias_gelu(batch: int, hidden: int, dtype: torch.dtype) -> Case:
    x, bias = randn(batch, 4 * hidden, dtype=dtype), randn(4 * hidden, dtype=dtype)
    return Case(
        "bias_gelu", ops.bias_gelu, lambda x, b: F.gelu(x + b), [(x, bias)], size(x, x, bias)
    )


def relu(batch: int, hidden: int, dtype: torch.dtype) -> Case:
    x = randn(batch, 4 * hidden, dtype=dtype)
    return Case("relu", ops.relu, F.relu, [(x,)], size(x, x))


SWEEPS: Sweeps = dict.fromkeys((silu_and_mul, gelu_and_mul, bias_gelu, relu), EVERYWHERE)
