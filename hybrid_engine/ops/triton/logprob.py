"""linear_logprob on a GPU, forward: a matrix product whose epilogue is an online softmax.

A program takes a block of rows and walks a share of the vocabulary tile by tile; the logits never
leave the chip. It writes four numbers a row, which a second kernel merges over the shares; there
are as many shares as fill the device. Memory: hidden and weight through the L2, where groups of row
blocks keep both, and 16 bytes a row and share.
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
from hybrid_engine.ops.triton.rows import as_rows, multiprocessors

LOWEST = tl.constexpr(-3.4028234663852886e38)  # of fp32; -inf - -inf would be NaN


@triton.jit
def linear_logprob_fwd_kernel(
    partial_ptr,  # [4, S, N] fp32: peak, mass, moment, target logit of each share
    hidden_ptr,  # [N, D]
    weight_ptr,  # [V, D]
    bias_ptr,  # [V] or null
    targets_ptr,  # [N] int64
    rows,
    vocabulary,
    dim,
    shares,
    tiles_per_share,
    stride_share,
    stride_statistic,
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
    block, share = grouped(tl.program_id(0).to(tl.int64), tl.cdiv(rows, BLOCK_N), shares)
    row = block * BLOCK_N + tl.arange(0, BLOCK_N)
    target = tl.load(targets_ptr + row, mask=row < rows, other=-1)
    peak = tl.full((BLOCK_N,), LOWEST, tl.float32)
    mass = tl.zeros((BLOCK_N,), tl.float32)  # sum of exp(logit - peak)
    moment = tl.zeros((BLOCK_N,), tl.float32)  # sum of exp(logit - peak) * (logit - peak)
    found = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    first = share * tiles_per_share * BLOCK_V
    for start in range(first, tl.minimum(first + tiles_per_share * BLOCK_V, vocabulary), BLOCK_V):
        logits, _ = logits_of(
            hidden_ptr, weight_ptr, bias_ptr, row, start, rows, vocabulary, dim,
            stride_hidden_row, stride_weight_row, temperature, softcap,
            HAS_CAP, PRECISION, BLOCK_N, BLOCK_V, BLOCK_D,
        )  # fmt: skip
        at_target = tl.where(is_target(target, start, BLOCK_V), logits, float("-inf"))
        found = tl.maximum(found, tl.max(at_target, 1))
        top = tl.maximum(peak, tl.max(logits, 1))
        drop = finite(peak - top)
        shifted = logits - top[:, None]
        weights = tl.exp(shifted)
        moment = tl.exp(drop) * (moment + mass * drop) + tl.sum(weights * finite(shifted), 1)
        mass = tl.exp(drop) * mass + tl.sum(weights, 1)
        peak = top
    out = partial_ptr + share * stride_share + row
    tl.store(out, peak, mask=row < rows)
    tl.store(out + stride_statistic, mass, mask=row < rows)
    tl.store(out + 2 * stride_statistic, moment, mask=row < rows)
    tl.store(out + 3 * stride_statistic, found, mask=row < rows)


@triton.jit
def linear_logprob_merge_kernel(
    logprobs_ptr,  # [N] fp32
    entropy_ptr,  # [N] fp32
    peak_ptr,  # [N] fp32
    log_mass_ptr,  # [N] fp32
    partial_ptr,  # [4, S, N] fp32
    targets_ptr,  # [N] int64
    rows,
    vocabulary,
    shares,
    stride_share,
    stride_statistic,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = row < rows
    peak = tl.full((BLOCK_N,), LOWEST, tl.float32)
    mass = tl.zeros((BLOCK_N,), tl.float32)
    moment = tl.zeros((BLOCK_N,), tl.float32)
    found = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    for share in range(0, shares):
        at = partial_ptr + share * stride_share + row
        share_peak = tl.load(at, mask=mask, other=0.0)
        share_mass = tl.load(at + stride_statistic, mask=mask, other=1.0)
        share_moment = tl.load(at + 2 * stride_statistic, mask=mask, other=0.0)
        found = tl.maximum(found, tl.load(at + 3 * stride_statistic, mask=mask, other=0.0))
        top = tl.maximum(peak, share_peak)
        drop, share_drop = finite(peak - top), finite(share_peak - top)
        moment = tl.exp(drop) * (moment + mass * drop)
        moment += tl.exp(share_drop) * (share_moment + share_mass * share_drop)
        mass = tl.exp(drop) * mass + tl.exp(share_drop) * share_mass
        peak = top
    target = tl.load(targets_ptr + row, mask=mask, other=0)
    found = tl.where((target >= 0) & (target < vocabulary), found, float("nan"))
    log_mass = tl.log(mass)
    tl.store(logprobs_ptr + row, found - peak - log_mass, mask=mask)
    tl.store(entropy_ptr + row, log_mass - moment / mass, mask=mask)
    tl.store(peak_ptr + row, peak, mask=mask)
    tl.store(log_mass_ptr + row, log_mass, mask=mask)


def shares_of(vocabulary_tiles: int, row_blocks: int, programs: int) -> tuple[int, int]:
    """Shares of the vocabulary and tiles in each: about `programs` in all, no share empty."""
    wanted = max(1, min(vocabulary_tiles, programs // row_blocks))
    tiles = triton.cdiv(vocabulary_tiles, wanted)
    return triton.cdiv(vocabulary_tiles, tiles), tiles


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    temperature: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if hidden.dtype == torch.float64 or not hidden.numel():
        return plain.linear_logprob_forward.reference(
            hidden, weight, targets, bias, temperature, softcap
        )
    rows, dim = hidden.shape
    vocabulary = weight.shape[0]
    shape = tile_shape(hidden.dtype)
    blocks = triton.cdiv(rows, shape["BLOCK_N"])
    shares, tiles = shares_of(
        triton.cdiv(vocabulary, shape["BLOCK_V"]), blocks, 8 * multiprocessors(hidden)
    )
    hidden, weight, targets = as_rows(hidden), as_rows(weight), targets.contiguous()
    partial = hidden.new_empty(4, shares, rows, dtype=torch.float32)
    linear_logprob_fwd_kernel[(blocks * shares,)](
        partial, hidden, weight, None if bias is None else bias.contiguous(), targets,
        rows, vocabulary, dim, shares, tiles,
        partial.stride(1), partial.stride(0), hidden.stride(0), weight.stride(0),
        temperature, softcap, HAS_CAP=softcap != 0, **shape,
    )  # fmt: skip
    logprobs, entropy, peak, log_mass = (
        hidden.new_empty(rows, dtype=torch.float32) for _ in range(4)
    )
    linear_logprob_merge_kernel[(triton.cdiv(rows, 128),)](
        logprobs, entropy, peak, log_mass, partial, targets,
        rows, vocabulary, shares, partial.stride(1), partial.stride(0), BLOCK_N=128,
    )  # fmt: skip
    return logprobs, entropy, peak, log_mass
