"""The ops that read weights or the KV cache, against torch's best."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.case import BLOCK, HEAD_DIM, HEADS, KV_HEADS, Case, Place, size
from hybrid_engine import ops

SCALE = HEAD_DIM**-0.5


def paged(at: Place, batch: int, keys: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Caches, block tables in random order and lengths."""
    blocks = batch * keys // BLOCK
    caches = at.randn(2, blocks, KV_HEADS, BLOCK, HEAD_DIM)
    tables = torch.randperm(blocks, device=at.device).int().view(batch, -1)
    return *caches, tables, torch.full((batch,), keys, dtype=torch.int32, device=at.device)


def dense(cache: Tensor, tables: Tensor) -> Tensor:
    """(B, K, S, D): what SDPA gets for nothing."""
    return cache[tables.long()].transpose(1, 2).flatten(2, 3)


def decodes(at: Place) -> Iterator[Case]:
    for batch, full, large in ((1, 4096, False), (1, 65536, True), (64, 4096, True)):
        keys = at.size(full)
        q = at.randn(batch, HEADS, HEAD_DIM)
        k_cache, v_cache, tables, lengths = paged(at, batch, keys)
        k, v = dense(k_cache, tables), dense(v_cache, tables)

        def ours(
            q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor,
            tables: Tensor = tables, lengths: Tensor = lengths,
        ) -> Tensor:  # fmt: skip
            return ops.decode_attention(q, k_cache, v_cache, tables, lengths, SCALE)

        def plain(q: Tensor, k: Tensor, v: Tensor, *caches: Tensor) -> Tensor:
            out = F.scaled_dot_product_attention(q.unsqueeze(2), k, v, enable_gqa=True)
            return out.squeeze(2)

        yield Case(
            ops.decode_attention, f"B{batch}-S{keys}", ours, plain, (q, k, v, k_cache, v_cache),
            size(k_cache, v_cache), large,
        )  # fmt: skip


def prefills(at: Place) -> Iterator[Case]:
    for batch, full in ((8, 512), (4, 4096)):
        tokens = max(BLOCK, at.size(full))
        q = at.randn(batch * tokens, HEADS, HEAD_DIM)
        k_cache, v_cache, tables, lengths = paged(at, batch, tokens)
        bounds = at.arange(batch + 1, torch.int32) * tokens
        wide = q.view(batch, tokens, HEADS, HEAD_DIM).transpose(1, 2).contiguous()
        k, v = dense(k_cache, tables), dense(v_cache, tables)

        def ours(
            q: Tensor, wide: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor,
            tables: Tensor = tables, lengths: Tensor = lengths, bounds: Tensor = bounds,
            tokens: int = tokens,
        ) -> Tensor:  # fmt: skip
            return ops.prefill_attention(
                q, k_cache, v_cache, tables, bounds, lengths, tokens, SCALE
            )

        def plain(q: Tensor, wide: Tensor, k: Tensor, v: Tensor, *caches: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(wide, k, v, is_causal=True, enable_gqa=True)

        yield Case(
            ops.prefill_attention, f"B{batch}-T{tokens}", ours, plain,
            (q, wide, k, v, k_cache, v_cache),
            flops=2 * batch * HEADS * tokens * tokens * HEAD_DIM,
            result=lambda out: out.transpose(1, 2).reshape(-1, HEADS, HEAD_DIM)
            if out.dim() == 4
            else out,
        )  # fmt: skip


def linears(at: Place) -> Iterator[Case]:
    out_dim, in_dim = at.size(28672), at.size(8192)  # 448 MiB of weights: beyond the L2 cache
    weight = at.randn(out_dim, in_dim) * in_dim**-0.5
    a, b = at.randn(16, in_dim) * in_dim**-0.5, at.randn(out_dim, 16)
    for rows in (1, 8, 16):
        x = at.randn(rows, in_dim)
        yield Case(
            ops.skinny_linear, f"B{rows}", ops.skinny_linear, F.linear, (x, weight),
            size(weight), True,
        )  # fmt: skip
        yield Case(
            ops.fused_lora, f"B{rows}-r16",
            lambda x, w, a, b: ops.fused_lora(x, w, None, [a], [b], [2.0]),
            lambda x, w, a, b: F.linear(x, w) + F.linear(F.linear(x, a), b) * 2.0,
            (x, weight, a, b), size(weight, a, b), True,
        )  # fmt: skip


FAMILIES = (decodes, prefills, linears)
