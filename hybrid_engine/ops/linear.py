"""Linear layers at decode shapes: few rows, and with low-rank adapters on top."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hybrid_engine.ops import check
from hybrid_engine.ops.registry import define_op

MAX_SKINNY_ROWS = 16
MAX_LORA_ADAPTERS = 32


def _fake(x: Tensor, weight: Tensor, *args: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> int:
    """The rows of x, after checking the operands."""
    check.has_last_dimension("x", x)
    check.first_operand("x", x)
    check.operand("weight", weight, (-1, x.shape[-1]), x.dtype, x)
    check.operand("bias", bias, (weight.shape[0],), x.dtype, x)
    return math.prod(x.shape[:-1])


def _wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = x.float() @ weight.float().T
    return out if bias is None else out + bias.float()


@define_op("skinny_linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor", fake=_fake)
def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b for at most 16 rows, reading the weights once, where they lie.

    Args:
        x: (..., in_dim), at most 16 rows, fp32, bf16 or fp16.
        weight: (out_dim, in_dim), the dtype of x; bias: (out_dim,) or None.

    Returns (..., out_dim). Sums in fp32, rounded once.
    """
    rows = _check(x, weight, bias)
    if rows > MAX_SKINNY_ROWS:
        raise ValueError(f"x: expected at most {MAX_SKINNY_ROWS} rows, got {rows}")
    return _wide_linear(x, weight, bias).to(x.dtype)


@define_op(
    "fused_lora(Tensor x, Tensor weight, Tensor? bias, Tensor[] lora_a, Tensor[] lora_b, "
    "float[] scales, Tensor? adapter_index=None) -> Tensor",
    fake=_fake,
)
def fused_lora(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    scales: list[float],
    adapter_index: Tensor | None = None,
) -> Tensor:
    """y = x W^T + b + sum over adapters i of scales[i] (x A_i^T) B_i^T, in one op.

    Args:
        x: (..., in_dim), N rows in all, fp32, bf16 or fp16.
        weight: (out_dim, in_dim); bias: (out_dim,) or None; both of the dtype of x.
        lora_a: (rank_i, in_dim) each, lora_b: (out_dim, rank_i) each, at most 32 pairs.
        scales: one for each adapter, usually alpha / rank.
        adapter_index: (N,) int32, which adapter a row uses, -1: none; None: every row uses the sum
            of all adapters. An index past the adapters counts as none.

    Returns (..., out_dim). Sums in fp32, rounded once. Source: arXiv 2106.09685, eq. 3.
    """
    rows = _check(x, weight, bias)
    _check_adapters(x, weight, lora_a, lora_b, scales)
    check.operand("adapter_index", adapter_index, (rows,), torch.int32, x)
    out = _wide_linear(x, weight, bias).view(rows, weight.shape[0])
    wide = x.float().view(rows, x.shape[-1])
    for i, (a, b, scale) in enumerate(zip(lora_a, lora_b, scales, strict=True)):
        term = scale * (wide @ a.float().T) @ b.float().T
        if adapter_index is not None:
            term = torch.where((adapter_index == i).unsqueeze(1), term, 0.0)
        out = out + term
    return out.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


def _check_adapters(
    x: Tensor, weight: Tensor, lora_a: list[Tensor], lora_b: list[Tensor], scales: list[float]
) -> None:
    count = len(lora_a)
    if len(lora_b) != count:
        raise ValueError(f"lora_b: expected {count} tensors, as many as lora_a, got {len(lora_b)}")
    if len(scales) != count:
        raise ValueError(f"scales: expected {count} values, as many as lora_a, got {len(scales)}")
    if count > MAX_LORA_ADAPTERS:
        raise ValueError(f"lora_a: expected at most {MAX_LORA_ADAPTERS} adapters, got {count}")
    for a, b in zip(lora_a, lora_b, strict=True):
        check.operand("lora_a", a, (-1, x.shape[-1]), x.dtype, x)
        check.operand("lora_b", b, (weight.shape[0], a.shape[0]), x.dtype, x)
