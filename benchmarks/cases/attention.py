"""Attention over the paged cache, decoding and prefill."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases.case import EVERYWHERE, Case, Sweeps, copies, heads_of, randn, size
from hybrid_engine import ops
from hybrid_engine.cache.pages import empty_pages


def paged(
    batch: int, kv_heads: int, keys: int, dim: int, dtype: torch.dtype, scattered: bool = True
) -> tuple[Any, ...]:
    blocks = -(-keys // 16)
    shape = (2, batch * blocks, kv_heads, 16, dim)
    caches = empty_pages(shape, dtype=dtype, device=torch.device("cpu")).normal_()
    order = torch.randperm(batch * blocks) if scattered else torch.arange(batch * blocks)
    tables = order.view(batch, blocks).int()
    return *caches, tables, torch.full((batch,), keys, dtype=torch.int32)


def gathered(cache: Tensor, tables: Tensor, keys: int) -> Tensor:
    """(B, K, S, D) from the paged cache."""
    return cache[tables.long()].transpose(1, 2).flatten(2, 3)[:, :, :keys]


def decode_attention(
    batch: int,
    hidden: int,
    dtype: torch.dtype,
    keys: int = 512,
    cold: bool = False,
    scattered: bool = True,
) -> Case:
    heads, kv_heads, dim = heads_of(hidden)
    bytes_of_one = 2 * batch * kv_heads * keys * dim * dtype.itemsize
    operands = [
        (
            randn(batch, heads, dim, dtype=dtype),
            *paged(batch, kv_heads, keys, dim, dtype, scattered),
        )
        for _ in range(copies(bytes_of_one, cold))
    ]

    def ours(q: Tensor, k: Tensor, v: Tensor, tables: Tensor, lengths: Tensor) -> Tensor:
        return ops.decode_attention(q, k, v, tables, lengths, dim**-0.5)

    def plain(q: Tensor, k: Tensor, v: Tensor, tables: Tensor, lengths: Tensor) -> Tensor:
        k, v = gathered(k, tables, keys), gathered(v, tables, keys)
        return F.scaled_dot_product_attention(q.unsqueeze(2), k, v, enable_gqa=True).squeeze(2)

    return Case("decode_attention", ours, plain, operands, bytes_of_one, cold=cold)


def decode_attention_long(batch: int, hidden: int, dtype: torch.dtype) -> Case:
    """Beyond the caches; blocks in order, as a fresh pool gives them to a lone sequence."""
    return decode_attention(batch, hidden, dtype, keys=16384, cold=True, scattered=False)


def decode_attention_scattered(batch: int, hidden: int, dtype: torch.dtype) -> Case:
    """Beyond the caches, blocks in random order."""
    return decode_attention(batch, hidden, dtype, keys=16384, cold=True)


def prefill_attention(batch: int, hidden: int, dtype: torch.dtype) -> Case:
    heads, kv_heads, dim = heads_of(hidden)
    keys = 128
    q = randn(batch * keys, heads, dim, dtype=dtype)
    k_cache, v_cache, tables, lengths = paged(batch, kv_heads, keys, dim, dtype)
    bounds = torch.arange(batch + 1, dtype=torch.int32) * keys

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.prefill_attention(q, k, v, tables, bounds, lengths, keys, dim**-0.5)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = gathered(k, tables, keys), gathered(v, tables, keys)
        q = q.view(batch, keys, heads, dim).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).reshape(batch * keys, heads, dim)

    return Case(
        "prefill_attention", ours, plain, [(q, k_cache, v_cache)],
        size(q, q, k_cache, v_cache),
    )  # fmt: skip


SWEEPS: Sweeps = {
    decode_attention: EVERYWHERE,
    decode_attention_long: ((1,), (4096,)),
    decode_attention_scattered: ((1,), (4096,)),
    prefill_attention: ((1, 8), (288, 1024)),
}
