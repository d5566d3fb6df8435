"""Rotary embedding of queries and keys on a GPU, in one launch; backward is the same kernel.

A program takes one token: it loads the token's cosines and sines once and turns all heads of both.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_engine.ops.rope import check_rope
from hybrid_engine.ops.rope import rope as rope_op


@triton.jit
def _turn_heads(
    out_ptr,  # [H, D] of one token
    x_ptr,  # [H, D] of one token
    cos,  # [1, BLOCK_PAIRS]
    sin,  # [1, BLOCK_PAIRS]
    heads,
    pairs,
    dim,
    stride_out_head,
    stride_x_head,
    INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    pair = tl.arange(0, BLOCK_PAIRS)[None, :]
    first = 2 * pair if INTERLEAVED else pair
    second = first + 1 if INTERLEAVED else pair + pairs
    for start in range(0, heads, BLOCK_H):
        head = (start + tl.arange(0, BLOCK_H)[:, None]).to(tl.int64)
        x_row, out_row = x_ptr + head * stride_x_head, out_ptr + head * stride_out_head
        mask = (head < heads) & (pair < pairs)
        a = tl.load(x_row + first, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(x_row + second, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_row + first, (a * cos - b * sin).to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out_row + second, (b * cos + a * sin).to(out_ptr.dtype.element_ty), mask=mask)
        if BLOCK_REST > 0:
            rest = 2 * pairs + tl.arange(0, BLOCK_REST)[None, :]
            rest_mask = (head < heads) & (rest < dim)
            kept = tl.load(x_row + rest, mask=rest_mask, other=0.0)
            tl.store(out_row + rest, kept, mask=rest_mask)


@triton.jit
def rope_fwd_kernel(
    q_out_ptr,  # [B, H, T, D]
    k_out_ptr,  # [B, K, T, D]
    q_ptr,  # [B, H, T, D]
    k_ptr,  # [B, K, T, D]
    cos_ptr,  # [B or 1, T, R/2]
    sin_ptr,  # [B or 1, T, R/2]
    tokens,
    heads,
    kv_heads,
    pairs,
    dim,
    stride_q_out_batch,
    stride_q_out_head,
    stride_q_out_token,
    stride_k_out_batch,
    stride_k_out_head,
    stride_k_out_token,
    stride_q_batch,
    stride_q_head,
    stride_q_token,
    stride_k_batch,
    stride_k_head,
    stride_k_token,
    stride_cos_batch,
    stride_cos_token,
    stride_sin_batch,
    stride_sin_token,
    INTERLEAVED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
    BLOCK_REST: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    batch, token = pid // tokens, pid % tokens
    pair = tl.arange(0, BLOCK_PAIRS)[None, :]
    cos_ptr += batch * stride_cos_batch + token * stride_cos_token
    sin_ptr += batch * stride_sin_batch + token * stride_sin_token
    cos = tl.load(cos_ptr + pair, mask=pair < pairs, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + pair, mask=pair < pairs, other=0.0).to(tl.float32)
    _turn_heads(
        q_out_ptr + batch * stride_q_out_batch + token * stride_q_out_token,
        q_ptr + batch * stride_q_batch + token * stride_q_token,
        cos,
        sin,
        heads,
        pairs,
        dim,
        stride_q_out_head,
        stride_q_head,
        INTERLEAVED,
        BLOCK_H,
        BLOCK_PAIRS,
        BLOCK_REST,
    )
    _turn_heads(
        k_out_ptr + batch * stride_k_out_batch + token * stride_k_out_token,
        k_ptr + batch * stride_k_batch + token * stride_k_token,
        cos,
        sin,
        kv_heads,
        pairs,
        dim,
        stride_k_out_head,
        stride_k_head,
        INTERLEAVED,
        BLOCK_H,
        BLOCK_PAIRS,
        BLOCK_REST,
    )


def _unit_columns(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    check_rope(q, k, cos, sin)
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    batch, heads, tokens, dim = q.shape
    if q_out.stride(3) != 1 or k_out.stride(3) != 1:  # laid out with columns apart: not worth it
        return rope_op.reference(q, k, cos, sin, interleaved)
    if not q.numel() and not k.numel():
        return q_out, k_out
    pairs = cos.shape[2]
    block_pairs = triton.next_power_of_2(pairs)
    rest = dim - 2 * pairs
    q, k, cos, sin = (_unit_columns(x) for x in (q, k, cos, sin))
    rope_fwd_kernel[(batch * tokens,)](
        q_out,
        k_out,
        q,
        k,
        cos,
        sin,
        tokens,
        heads,
        k.shape[1],
        pairs,
        dim,
        *q_out.stride()[:3],
        *k_out.stride()[:3],
        *q.stride()[:3],
        *k.stride()[:3],
        cos.stride(0) if cos.shape[0] == batch else 0,
        cos.stride(1),
        sin.stride(0) if sin.shape[0] == batch else 0,
        sin.stride(1),
        INTERLEAVED=interleaved,
        BLOCK_H=max(1, min(triton.next_power_of_2(heads), 1024 // block_pairs)),
        BLOCK_PAIRS=block_pairs,
        BLOCK_REST=triton.next_power_of_2(rest) if rest else 0,
        num_warps=4,
    )
    return q_out, k_out
