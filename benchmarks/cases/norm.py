"""Norms, alone and after adding to the residual."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.case import EVERYWHERE, Case, Sweeps, randn, size
from hybrid_engine import ops

EPS = 1e-5


def rms_norm(batch: int, hidden: int, dtype: torch.dtype) -> Case:
    x, weight = randn(batch, hidden, dtype=dtype), randn(hidden, dtype=dtype)
    return Case(
        "rms_norm",
        lambda x, w: ops.rms_norm(x, w, EPS),
        lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w,
        [(x, weight)], size(x, weight, x),
    )  # fmt: skip


def add_rms_norm(batch: int, hidden: int, dtype: torch.dtype) -> Case:
    x, residual = randn(batch, hidden, dtype=dtype), torch.zeros(batch, hidden, dtype=dtype)
    weight = randn(hidden, dtype=dtype)

    def plain(x: Tensor, residual: Tensor, w: Tensor) -> Tensor:
        residual.add_(x)
        return residual * torch.rsqrt(residual.pow(2).mean(-1, keepdim=True) + EPS) * w

    def restored(out: Tensor, args: tuple[Any, ...]) -> Tensor:
        args[1].zero_()
        return out

    return Case(
        "add_rms_norm", lambda x, r, w: ops.add_rms_norm(x, r, w, EPS), plain,
        [(x, residual, weight)], size(x, residual, residual, weight, x), restored,
    )  # fmt: skip


def layer_norm(batch: int, hidden: int, dtype: torch.dtype) -> Case:
    x, weight, bias = randn(batch, hidden, dtype=dtype), *randn(2, hidden, dtype=dtype)
    return Case(
        "layer_norm",
        lambda x, w, b: ops.layer_norm(x, w, b, EPS),
        lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, EPS),
        [(x, weight, bias)], size(x, weight, bias, x),
    )  # fmt: skip


SWEEPS: Sweeps = dict.fromkeys((rms_norm, add_rms_norm, layer_norm), EVERYWHERE)
