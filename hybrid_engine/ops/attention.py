"""Attention over the paged KV cache: one query token a sequence, or a packed batch of prompts."""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_engine.ops import check
from hybrid_engine.ops.registry import define_op


def _fake(q: Tensor, *args: object) -> Tensor:
    return torch.empty_like(q)


def _validate_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    *args: object,
    **kwargs: object,
) -> None:
    """Every block that a sequence's length reaches must be in its table, and in the cache."""
    check.shape("q", q, (-1, -1, -1))
    check.shape("seq_lens", seq_lens, q.shape[:1])
    _validate_blocks(k_cache, block_tables, seq_lens)


def _validate_blocks(k_cache: Tensor, block_tables: Tensor, seq_lens: Tensor) -> None:
    check.shape("k_cache", k_cache, (-1, -1, -1, -1))
    check.shape("block_tables", block_tables, (seq_lens.numel(), -1))
    num_blocks, _, block_size, _ = k_cache.shape
    max_blocks = block_tables.shape[1]
    check.indices("seq_lens", seq_lens, max_blocks * block_size + 1)
    places = torch.arange(max_blocks, device=seq_lens.device)
    used = places < -(-seq_lens.unsqueeze(1) // block_size)  # (B, max_blocks)
    check.indices("block_tables", torch.where(used, block_tables, 0), num_blocks)


def _validate_prefill(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens: Tensor,
    seq_lens: Tensor,
    *args: object,
    **kwargs: object,
) -> None:
    _validate_blocks(k_cache, block_tables, seq_lens)
    check.shape("cu_seqlens", cu_seqlens, (seq_lens.numel() + 1,))
    check.indices("cu_seqlens", cu_seqlens, q.shape[0] + 1)
    for i, (new, cached) in enumerate(
        zip(cu_seqlens.diff().tolist(), seq_lens.tolist(), strict=True)
    ):
        if not 0 <= new <= cached:
            raise ValueError(
                f"cu_seqlens: expected at most seq_lens[{i}]={cached} new tokens, got {new}"
            )


@define_op(
    "decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, "
    "Tensor seq_lens, float scale, Tensor? alibi_slopes=None, int window=0, float softcap=0.0, "
    "int num_splits=0) -> Tensor",
    fake=_fake,
    validate=_validate_decode,
)
def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scale: float,
    alibi_slopes: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    num_splits: int = 0,
) -> Tensor:
    """Attention of one query token a sequence over its cached keys, itself included.

    Args:
        q: (B, H, D), fp32, bf16 or fp16.
        k_cache, v_cache: (num_blocks, K, block_size, D), the dtype of q; H is a multiple of K.
        block_tables: (B, max_blocks) int32; entries past the sequence's length are not read.
        seq_lens: (B,) int32, cached keys of each sequence; 0 gives zeros.
        scale: multiplies q k^T, usually D ** -0.5.
        alibi_slopes: (H,) fp32 or None: adds slope * (key position - query position),
            arXiv 2108.12409.
        window: only the last `window` keys count; 0: all.
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2); 0: no cap.
        num_splits: key ranges worked on in parallel; 0: chosen from the shapes.

    Returns (B, H, D). Arithmetic in fp32.
    """
    batch = q.shape[0]
    check.shape("seq_lens", seq_lens, (batch,))
    cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    return prefill_attention.reference(
        q, k_cache, v_cache, block_tables, cu_seqlens, seq_lens, 1, scale, alibi_slopes, window,
        softcap,
    )  # fmt: skip


@define_op(
    "prefill_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_tables, "
    "Tensor cu_seqlens, Tensor seq_lens, int max_query_len, float scale, "
    "Tensor? alibi_slopes=None, int window=0, float softcap=0.0) -> Tensor",
    fake=_fake,
    validate=_validate_prefill,
)
def prefill_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    cu_seqlens: Tensor,
    seq_lens: Tensor,
    max_query_len: int,
    scale: float,
    alibi_slopes: Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """Causal attention of packed queries, each sequence's last tokens, over its cached keys.

    The keys and values of the new tokens are in the cache already, so a prefix that was cached
    earlier, or is shared with another sequence, needs no special case.

    Args:
        q: (N, H, D): the new tokens of B sequences, one after the other.
        cu_seqlens: (B + 1,) int32, first query of each sequence, then N.
        seq_lens: (B,) int32, cached keys of each sequence, its new tokens included.
        max_query_len: the most new tokens that one sequence has.
        The rest as in `decode_attention`.

    Returns (N, H, D).
    """
    batch = seq_lens.numel()
    check.shape("k_cache", k_cache, (-1, -1, -1, -1))
    check.shape("q", q, (-1, -1, k_cache.shape[-1]))
    check.first_operand("q", q)
    check.operand("k_cache", k_cache, k_cache.shape, q.dtype, q)
    check.operand("v_cache", v_cache, k_cache.shape, q.dtype, q)
    check.operand("seq_lens", seq_lens, (batch,), torch.int32, q)
    check.operand("block_tables", block_tables, (batch, -1), torch.int32, q)
    check.operand("cu_seqlens", cu_seqlens, (batch + 1,), torch.int32, q)
    check.operand("alibi_slopes", alibi_slopes, (q.shape[1],), torch.float32, q)
    if q.shape[1] % k_cache.shape[1]:
        raise ValueError(f"q: {q.shape[1]} heads are no multiple of {k_cache.shape[1]} kv heads")
    out = torch.zeros_like(q)
    bounds, lengths = cu_seqlens.tolist(), seq_lens.tolist()
    for i, (start, end, length) in enumerate(zip(bounds[:-1], bounds[1:], lengths, strict=True)):
        if end > start and length > 0:
            keys = _gather(k_cache, block_tables[i], length)
            values = _gather(v_cache, block_tables[i], length)
            bias = _bias(end - start, length, alibi_slopes, window, q.device)
            out[start:end] = _attend(q[start:end], keys, values, bias, scale, softcap)
    return out


def _gather(cache: Tensor, table: Tensor, length: int) -> Tensor:
    """The first `length` cached rows of one sequence, (K, length, D) fp32."""
    block_size = cache.shape[2]
    blocks = cache[table[: -(-length // block_size)].long()]  # (blocks, K, block_size, D)
    return blocks.transpose(0, 1).flatten(1, 2)[:, :length].float()


def _bias(
    queries: int, keys: int, slopes: Tensor | None, window: int, device: torch.device
) -> Tensor:
    """Additive scores (H or 1, queries, keys): causal, windowed, ALiBi."""
    query_position = torch.arange(keys - queries, keys, device=device).unsqueeze(1)
    distance = torch.arange(keys, device=device) - query_position  # (queries, keys), <= 0 is past
    visible = distance <= 0
    if window > 0:
        visible &= distance > -window
    bias = torch.zeros(1, queries, keys, dtype=torch.float32, device=device).masked_fill(
        ~visible, float("-inf")
    )
    return bias if slopes is None else bias + slopes.view(-1, 1, 1) * distance


def _attend(
    q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scale: float, softcap: float
) -> Tensor:
    group = q.shape[1] // keys.shape[0]
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    scores = torch.einsum("thd,hsd->hts", q.float(), keys) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores + bias, -1)
    return torch.einsum("hts,hsd->thd", weights, values).to(q.dtype)
