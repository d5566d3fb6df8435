"""linear_logprob on a GPU, backward, for one tile of the vocabulary after another.

The tile's logits are made again and their gradient written to a buffer (N, tile), 1/64 of (N, V);
d_hidden gains buffer @ weight, in fp32; d_weight of the tile is buffer^T @ hidden, by the BLAS.
One product more than the plain backward pass, and none of its passes over (N, V).
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_engine.ops import logprob as plain
from hybrid_engine.ops.triton.logprob_tile import (
    finite,
    grouped,
    is_target,
    logits_of,
    tile_shape,
)
from hybrid_engine.ops.triton.rows import as_rows


@triton.jit
def linear_logprob_bwd_logits_kernel(
    d_logits_ptr,  # [N, W]: of the vocabulary from first to first + W
    d_logprobs_ptr,  # [N] fp32
    d_entropy_ptr,  # [N] fp32
    hidden_ptr,  # [N, D]
    weight_ptr,  # [W, D]
    bias_ptr,  # [W] or null
    targets_ptr,  # [N] int64
    entropy_ptr,  # [N] fp32
    peak_ptr,  # [N] fp32
    log_mass_ptr,  # [N] fp32
    rows,
    width,
    dim,
    first,
    stride_d_logits_row,
    stride_hidden_row,
    stride_weight_row,
    temperature,
    softcap,
    HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks, tiles = tl.cdiv(rows, BLOCK_N), tl.cdiv(width, BLOCK_V)
    block, tile = grouped(tl.program_id(0).to(tl.int64), blocks, tiles)
    row = block * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tile * BLOCK_V
    logits, slope = logits_of(
        hidden_ptr, weight_ptr, bias_ptr, row, start, rows, width, dim,
        stride_hidden_row, stride_weight_row, temperature, softcap,
        HAS_CAP, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D,
    )  # fmt: skip
    mask = row < rows
    d_logprob = tl.load(d_logprobs_ptr + row, mask=mask, other=0.0)[:, None]
    d_entropy = tl.load(d_entropy_ptr + row, mask=mask, other=0.0)[:, None]
    entropy = tl.load(entropy_ptr + row, mask=mask, other=0.0)[:, None]
    peak = tl.load(peak_ptr + row, mask=mask, other=0.0)[:, None]
    log_mass = tl.load(log_mass_ptr + row, mask=mask, other=0.0)[:, None]
    target = tl.load(targets_ptr + row, mask=mask, other=-1) - first
    logp = logits - peak - log_mass
    d_logits = -tl.exp(logp) * (d_logprob + d_entropy * (finite(logp) + entropy))
    d_logits += tl.where(is_target(target, start, BLOCK_V), d_logprob, 0.0)
    d_logits = (d_logits * slope).to(d_logits_ptr.dtype.element_ty)
    out = d_logits_ptr + block * BLOCK_N * stride_d_logits_row + start
    column = tl.arange(0, BLOCK_V)
    inside = mask[:, None] & (start + column < width)[None, :]
    at = tl.arange(0, BLOCK_N)[:, None] * stride_d_logits_row + column[None, :]
    tl.store(out + at, d_logits, mask=inside)


@triton.jit
def linear_logprob_bwd_hidden_kernel(
    d_hidden_ptr,  # [N, D] fp32, added to
    d_logits_ptr,  # [N, W]
    weight_ptr,  # [W, D]
    rows,
    width,
    dim,
    stride_d_logits_row,
    stride_weight_row,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks, tiles = tl.cdiv(rows, BLOCK_N), tl.cdiv(dim, BLOCK_D)
    block, tile = grouped(tl.program_id(0).to(tl.int64), blocks, tiles)
    row = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    d_hidden = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    d_logits_row = d_logits_ptr + row[:, None] * stride_d_logits_row
    for start in range(0, width, BLOCK_V):
        column = (start + tl.arange(0, BLOCK_V)).to(tl.int64)
        d_logits_mask = (row < rows)[:, None] & (column < width)[None, :]
        d_logits = tl.load(d_logits_row + column[None, :], mask=d_logits_mask, other=0.0)
        weight_at = weight_ptr + column[:, None] * stride_weight_row + k[None, :]
        weight_mask = (column < width)[:, None] & (k < dim)[None, :]
        weight = tl.load(weight_at, mask=weight_mask, other=0.0).to(d_logits.dtype)
        d_hidden = tl.dot(d_logits, weight, d_hidden, input_precision=PRECISION)
    mask = (row < rows)[:, None] & (k < dim)[None, :]
    at = tl.arange(0, BLOCK_N)[:, None] * dim + tl.arange(0, BLOCK_D)[None, :]
    out = d_hidden_ptr + block * BLOCK_N * dim + tile * BLOCK_D + at
    tl.store(out, tl.load(out, mask=mask, other=0.0) + d_hidden, mask=mask)


def vocabulary_per_tile(rows: int, vocabulary: int) -> int:
    """V/64, or what makes a buffer of 4 Mi numbers where that is more: fewer, larger launches."""
    return 128 * triton.cdiv(max(vocabulary // 64, (4 << 20) // rows), 128)


def linear_logprob_backward(
    needs: list[bool],
    grad_logprobs: Tensor,
    grad_entropy: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    entropy: Tensor,
    peak: Tensor,
    log_mass: Tensor,
    temperature: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    if hidden.dtype == torch.float64 or not hidden.numel():
        return plain.linear_logprob_backward.reference(
            needs, grad_logprobs, grad_entropy, hidden, weight, targets, bias,
            entropy, peak, log_mass, temperature, softcap,
        )  # fmt: skip
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    _, d_weight, d_bias = plain.gradients_like(needs, hidden, weight, bias)
    d_hidden = hidden.new_zeros(hidden.shape if needs[0] else 0, dtype=torch.float32)
    hidden, weight = as_rows(hidden), as_rows(weight)
    row_inputs = [x.contiguous() for x in (targets, entropy, peak, log_mass)]
    upstream = [x.contiguous() for x in (grad_logprobs, grad_entropy)]
    tile = vocabulary_per_tile(rows, vocabulary)
    buffer = hidden.new_empty(rows, min(tile, vocabulary))
    for first in range(0, vocabulary, tile):
        vocab = slice(first, min(first + tile, vocabulary))
        d_logits = buffer[:, : vocab.stop - first]
        tile_bias = None if bias is None else bias[vocab].contiguous()
        _logits_gradient(
            d_logits, upstream, hidden, weight[vocab], tile_bias, row_inputs, first,
            temperature, softcap,
        )  # fmt: skip
        if needs[0]:
            _add_to_hidden(d_hidden, d_logits, weight[vocab])
        if needs[1]:
            _product(d_weight[vocab], d_logits.T, hidden)
        if needs[2]:
            d_bias[vocab] = d_logits.sum(0, dtype=torch.float32)
    return d_hidden.to(hidden.dtype), d_weight, d_bias


def _logits_gradient(
    d_logits: Tensor,
    upstream: list[Tensor],
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    row_inputs: list[Tensor],
    first: int,
    temperature: float,
    softcap: float,
) -> None:
    (rows, dim), width = hidden.shape, weight.shape[0]
    shape = tile_shape(hidden.dtype)
    grid = (triton.cdiv(rows, shape["BLOCK_N"]) * triton.cdiv(width, shape["BLOCK_V"]),)
    linear_logprob_bwd_logits_kernel[grid](
        d_logits, *upstream, hidden, weight, bias, *row_inputs, rows, width, dim, first,
        d_logits.stride(0), hidden.stride(0), weight.stride(0),
        temperature, softcap, HAS_CAP=softcap != 0, **shape,
    )  # fmt: skip


def _add_to_hidden(d_hidden: Tensor, d_logits: Tensor, weight: Tensor) -> None:
    (rows, dim), width = d_hidden.shape, weight.shape[0]
    shape = tile_shape(d_logits.dtype)
    shape["BLOCK_D"], shape["BLOCK_V"] = shape["BLOCK_V"], shape["BLOCK_D"]
    grid = (triton.cdiv(rows, shape["BLOCK_N"]) * triton.cdiv(dim, shape["BLOCK_D"]),)
    linear_logprob_bwd_hidden_kernel[grid](
        d_hidden, d_logits, weight, rows, width, dim,
        d_logits.stride(0), weight.stride(0), **shape,
    )  # fmt: skip


def _product(out: Tensor, a: Tensor, b: Tensor) -> None:
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        out.copy_(a @ b)
