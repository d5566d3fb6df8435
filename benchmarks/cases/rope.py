"""From the QKV product to rotated queries and stored keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cases.case import EVERYWHERE, Case, Sweeps, heads_of, randn, size
from hybrid_engine import ops


def rope_and_store_kv(batch: int, hidden: int, dtype: torch.dtype) -> Case:
    heads, kv_heads, dim = heads_of(hidden)
    qkv = randn(batch, (heads + 2 * kv_heads) * dim, dtype=dtype)
    angles = torch.rand(1024, dim // 2) * 6
    table = torch.cat((angles.cos(), angles.sin()), -1)
    positions = torch.arange(batch) + 100
    caches = torch.zeros(2, batch + 1, kv_heads, 16, dim, dtype=dtype)
    slots = torch.arange(batch) * 16 + 5

    def ours(qkv: Tensor, table: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return ops.rope_and_store_kv(
            qkv, None, None, None, table, positions, k_cache, v_cache, slots, heads
        )

    def plain(qkv: Tensor, table: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        q, k, v = qkv.view(batch, -1, dim).split([heads, kv_heads, kv_heads], 1)
        half = table[positions].to(qkv.dtype).unsqueeze(1)
        cos, sin = (torch.cat((x, x), -1) for x in half.chunk(2, -1))

        def turn(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return x * cos + torch.cat((-second, first), -1) * sin

        block, offset = slots // 16, slots % 16
        k_cache[block, :, offset] = turn(k)
        v_cache[block, :, offset] = v
        return turn(q)

    return Case(
        "rope_and_store_kv", ours, plain, [(qkv, table, *caches)], 2 * size(qkv),
        lambda out, args: torch.cat((out.flatten(), args[2].flatten(), args[3].flatten())),
    )  # fmt: skip


SWEEPS: Sweeps = {rope_and_store_kv: EVERYWHERE}
