from __future__ import annotations

import math
from dataclasses import dataclass, replace

import pytest
import torch

from hybrid_engine import ops


@dataclass(frozen=True)
class Case:
    name: str
    lengths: tuple[int, ...]  # cached keys of each sequence
    heads: int = 8
    kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    window: int = 0
    softcap: float = 0.0
    alibi: bool = False
    queries: tuple[int, ...] = ()  # new tokens of each sequence; decode: one each
    num_splits: int = 0

    def __str__(self):
        c = self
        return (
            f"{c.name}-B{len(c.lengths)}-S{max(c.lengths)}-H{c.heads}-K{c.kv_heads}-D{c.head_dim}"
        )


DECODE = [
    Case("mha", (63,), heads=8, kv_heads=8),
    Case("gqa4", (1, 7, 63, 257), heads=8, kv_heads=2),
    Case("gqa8", (257, 1), heads=8, kv_heads=1),
    Case("d32", (7, 65), head_dim=32),
    Case("d80", (64, 17), head_dim=80),
    Case("d96", (33,), head_dim=96, block_size=32),
    Case("d128", (100, 3), head_dim=128),
    Case("d256", (40,), head_dim=256),
    Case("odd", (5, 31), heads=3, kv_heads=3, head_dim=7, block_size=5),
    Case("block1", (9, 4), block_size=1),
    Case("window", (257, 3, 16), window=16),
    Case("window1", (33,), window=1),
    Case("softcap", (65, 2), softcap=3.0),
    Case("alibi", (63, 5), alibi=True),
    Case("everything", (257, 40), window=60, softcap=5.0, alibi=True),
    Case("empty_sequence", (0, 9)),
    Case("long", (3000,), kv_heads=1),
    Case("splits3", (257, 40, 1), num_splits=3),
    Case("splits64", (257, 5), num_splits=64),
    Case("window_splits", (513,), num_splits=5, window=100, softcap=4.0, alibi=True),
]
PREFILL = [
    Case("whole", (63, 1, 17), queries=(63, 1, 17)),
    Case("prefix", (63, 40, 257), queries=(7, 1, 257)),
    Case("decode_mixed", (63, 40, 9), queries=(1, 40, 0)),
    Case("mha_d128", (65, 130), queries=(65, 2), heads=4, kv_heads=4, head_dim=128),
    Case("gqa8", (33,), queries=(33,), kv_heads=1),
    Case("odd", (31, 5), queries=(31, 2), heads=3, kv_heads=3, head_dim=7, block_size=5),
    Case("window", (100, 20), queries=(100, 5), window=16),
    Case("everything", (100, 20), queries=(50, 20), window=30, softcap=5.0, alibi=True),
    Case("d256", (70,), queries=(35,), head_dim=256),
]


def bias_of(case, keys, queries, slopes, dtype):
    """Additive scores (H or 1, queries, keys): causal, windowed, ALiBi."""
    distance = torch.arange(keys) - torch.arange(keys - queries, keys).unsqueeze(1)
    hidden = distance > 0
    if case.window:
        hidden |= distance <= -case.window
    bias = torch.zeros(1, queries, keys) if slopes is None else slopes.view(-1, 1, 1) * distance
    return bias.masked_fill(hidden, -math.inf).to(dtype)


def plain(case, q, keys, values, slopes=None):
    """Packed attention written out in the dtype of q, (N, H, D)."""
    out, start = torch.zeros_like(q), 0
    for i, (k, v) in enumerate(zip(keys, values, strict=True)):
        count = case.queries[i] if case.queries else 1
        queries = q[start : start + count]
        if len(k) and count:
            group = case.heads // case.kv_heads
            k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))  # (H, S, D)
            scores = queries.transpose(0, 1) @ k.mT * case.head_dim**-0.5
            if case.softcap:
                scores = case.softcap * torch.tanh(scores / case.softcap)
            scores = scores + bias_of(case, k.shape[1], count, slopes, q.dtype)
            out[start : start + count] = (torch.softmax(scores, -1) @ v).transpose(0, 1)
        start += count
    return out


def slopes_of(case):
    return torch.logspace(-1, -3, case.heads) if case.alibi else None


@pytest.fixture
def attend(run, paged_cache, rng, dtype):
    """Runs a case; returns the output and the operands of `plain`."""

    def call(case, scale_q=1.0, run=run):
        c = case
        cache = paged_cache(list(c.lengths), c.kv_heads, c.head_dim, dtype, c.block_size)
        tokens = sum(c.queries) if c.queries else len(c.lengths)
        q = (torch.randn(tokens, c.heads, c.head_dim, generator=rng) * scale_q).to(dtype)
        operands = (q, cache.k_cache, cache.v_cache, cache.block_tables)
        slopes, scale = slopes_of(c), c.head_dim**-0.5
        shared = (scale, slopes, c.window, c.softcap)
        if c.queries:
            bounds = torch.tensor([0, *c.queries], dtype=torch.int32).cumsum(0, dtype=torch.int32)
            args = (*operands, bounds, cache.seq_lens, max(c.queries), *shared)
            out = run(ops.prefill_attention, *args)
        else:
            out = run(ops.decode_attention, *operands, cache.seq_lens, *shared, c.num_splits)
        return out, (q, cache.keys, cache.values, slopes)

    return call


@pytest.mark.isa
@pytest.mark.parametrize("case", DECODE, ids=str)
def test_decode_attention(attend, assert_accurate, case):
    out, operands = attend(case)
    assert_accurate(out, lambda *x: plain(case, *x), *operands)


@pytest.mark.isa
@pytest.mark.parametrize("case", PREFILL, ids=str)
def test_prefill_attention(attend, assert_accurate, case):
    out, operands = attend(case)
    assert_accurate(out, lambda *x: plain(case, *x), *operands)


@pytest.mark.parametrize("scale_q", [0.0, 100.0], ids=["uniform", "one_hot"])
def test_extreme_scores(attend, assert_accurate, scale_q):
    case = Case("extreme", (63, 257))
    out, operands = attend(case, scale_q)
    assert_accurate(out, lambda *x: plain(case, *x), *operands)


def test_nan_query_stays_in_its_head(run, paged_cache, rng, dtype):
    cache = paged_cache([33, 9], 2, 64, dtype)
    q = torch.randn(2, 8, 64, generator=rng).to(dtype)
    args = (cache.k_cache, cache.v_cache, cache.block_tables, cache.seq_lens, 0.125)
    clean = run(ops.decode_attention, q, *args)
    q[0, 5, 3] = float("nan")
    out = run(ops.decode_attention, q, *args)
    assert out[0, 5].isnan().all()
    out[0, 5] = clean[0, 5]
    assert torch.equal(out, clean)


def test_a_sequence_does_not_depend_on_its_batch(run, paged_cache, rng, dtype):
    cache = paged_cache([63, 257, 5], 2, 64, dtype)
    q = torch.randn(3, 8, 64, generator=rng).to(dtype)

    def rows(index):
        return run(
            ops.decode_attention, q[index], cache.k_cache, cache.v_cache,
            cache.block_tables[index], cache.seq_lens[index], 0.125, None, 0, 0.0, 1,
        )  # fmt: skip

    assert torch.equal(rows(slice(0, 3))[1:2], rows(slice(1, 2)))


@pytest.mark.parametrize("dtype", [torch.float32], ids=["fp32"])
def test_no_token_and_no_sequence(attend):
    assert attend(Case("none", (9, 3), queries=(0, 0)))[0].shape == (0, 8, 64)
    q, cache = torch.ones(0, 8, 64), torch.ones(2, 2, 16, 64)
    tables, lengths = torch.ones(0, 2, dtype=torch.int32), torch.ones(0, dtype=torch.int32)
    assert ops.decode_attention(q, cache, cache, tables, lengths, 1.0).shape == (0, 8, 64)


def decode_arguments():
    return {
        "q": torch.ones(2, 8, 64),
        "k_cache": torch.ones(4, 2, 16, 64),
        "v_cache": torch.ones(4, 2, 16, 64),
        "block_tables": torch.zeros(2, 3, dtype=torch.int32),
        "seq_lens": torch.ones(2, dtype=torch.int32),
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": torch.ones(2, 8, 32)}, r"q: expected \[any, any, 64\], got \[2, 8, 32\]"),
        ({"q": torch.ones(2, 7, 64)}, "q: 7 heads are no multiple of 2 kv heads"),
        ({"q": torch.ones(2, 8, 64).double()}, "q: expected float32, bfloat16 or float16, got"),
        ({"q": torch.ones(2, 64, 8).mT}, "q: expected a contiguous tensor"),
        ({"k_cache": torch.ones(4, 2, 16, 64).half()}, "k_cache: expected float32, got float16"),
        ({"v_cache": torch.ones(4, 2, 8, 64)}, r"v_cache: expected \[4, 2, 16, 64\], got"),
        ({"block_tables": torch.zeros(2, 3).long()}, "block_tables: expected int32, got int64"),
        ({"block_tables": torch.zeros(3, 3).int()}, r"block_tables: expected \[2, any\], got"),
        ({"seq_lens": torch.ones(3).int()}, r"seq_lens: expected \[2\], got \[3\]"),
        ({"alibi_slopes": torch.ones(4)}, r"alibi_slopes: expected \[8\], got \[4\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_bad_input_names_argument_and_values(run, changed, message):
    args = decode_arguments() | changed
    slopes = args.pop("alibi_slopes", None)
    with pytest.raises((ValueError, RuntimeError), match=message):
        run(ops.decode_attention, *args.values(), 0.125, slopes)


def test_opcheck(paged_cache, rng, dtype):
    cache = paged_cache([5, 17], 2, 32, dtype)
    q = torch.randn(2, 4, 32, generator=rng).to(dtype)
    operands = (q, cache.k_cache, cache.v_cache, cache.block_tables)
    torch.library.opcheck(ops.decode_attention.overload, (*operands, cache.seq_lens, 0.2))
    bounds = torch.tensor([0, 1, 2], dtype=torch.int32)
    args = (*operands, bounds, cache.seq_lens, 1, 0.2)
    torch.library.opcheck(ops.prefill_attention.overload, args)


def test_one_query_a_sequence_is_decoding(attend, paged_cache):
    """Decode and prefill of the same tokens differ by at most their rounding."""
    case = Case("same", (33, 9), queries=(1, 1))
    prefill, (q, keys, values, _) = attend(case)
    decode = plain(replace(case, queries=()), q.double(), [k.double() for k in keys],
                   [v.double() for v in values])  # fmt: skip
    assert (prefill.double() - decode).abs().max() <= 2 * torch.finfo(q.dtype).eps
