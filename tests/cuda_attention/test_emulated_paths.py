"""The sizes at which the launcher changes its path, and what only the kernels promise."""

from __future__ import annotations

import pytest
import torch

from hybrid_engine import ops
from tests.cuda.layout import misaligned
from tests.cuda_emulator.build import Schedule
from tests.ops.test_attention import Case, attend, plain

FAMILY = "attention"
attend = attend
# Sizes do not change how threads meet: the two schedules that find the most.
SCHEDULES = [Schedule("random", "late", seed=1), Schedule("greedy", "eager", seed=2)]

DECODE = [
    # Every width that head dimensions are rounded up to, from below, and the last one that fits.
    *(Case(f"dim{d}", (65, 1), head_dim=d) for d in (8, 72, 112, 136, 160, 192, 224)),
    # Rows of a tile: 16 of a warp, 128 of a prompt and 64 with 256 dimensions; without tensor cores
    # 1 and 8.
    *(Case(f"group{g}", (70,), heads=g, kv_heads=1) for g in (1, 9, 16, 17, 33)),
    Case("wide_group", (70,), heads=67, kv_heads=1, head_dim=256),
    # One key more and less than a tile of 64, of 32 with 256 dimensions, and a split of one tile.
    *(Case(f"keys{s}", (s,), kv_heads=8, num_splits=2) for s in (63, 64, 65, 127, 128, 129)),
    *(Case(f"keys{s}", (s,), kv_heads=4, head_dim=256, heads=4) for s in (31, 32, 33)),
    # The window opens and closes inside a tile, at its edge, and past the first split.
    *(Case(f"window{w}", (200,), kv_heads=1, window=w, num_splits=3) for w in (63, 64, 65, 199)),
    Case("block_of_7", (100, 6), block_size=7),
    Case("block_of_128", (130, 127), block_size=128),
]
PREFILL = [
    *(Case(f"dim{d}", (33,), head_dim=d, queries=(33,)) for d in (8, 72, 112, 136, 224)),
    # Rows: one tile of 128, one row more; warps with no row, a tile with one row.
    *(
        Case(f"rows{n}", (n,), heads=1, kv_heads=1, queries=(n,))
        for n in (16, 17, 32, 33, 128, 129)
    ),
    Case("tile256", (65,), heads=1, kv_heads=1, head_dim=256, queries=(65,)),
    # A window shorter than the rows of a warp: its rows share no key with those below.
    Case("narrow_window", (200,), heads=1, kv_heads=1, window=20, queries=(200,)),
    # Keys around the tiles of 48 with 128 dimensions.
    *(Case(f"keys{s}", (s,), head_dim=128, queries=(5,)) for s in (47, 48, 49, 97)),
    # Few queries after a long prefix: the keys are split among blocks.
    Case("split", (700, 300), queries=(5, 5), kv_heads=1),
    Case("split_window", (700,), queries=(5,), kv_heads=1, window=400, alibi=True, softcap=3.0),
    Case("group3", (40, 9), heads=3, kv_heads=1, queries=(40, 3)),
]


@pytest.mark.parametrize("case", DECODE, ids=str)
def test_every_decode_path(attend, assert_accurate, case):
    out, operands = attend(case)
    assert_accurate(out, lambda *x: plain(case, *x), *operands)


@pytest.mark.parametrize("case", PREFILL, ids=str)
def test_every_prefill_path(attend, assert_accurate, case):
    out, operands = attend(case)
    assert_accurate(out, lambda *x: plain(case, *x), *operands)


@pytest.fixture
def decode_inputs(paged_cache, rng, dtype):
    def make(lengths=(70, 9), heads=8, kv_heads=2, head_dim=64):
        cache = paged_cache(list(lengths), kv_heads, head_dim, dtype)
        q = torch.randn(len(lengths), heads, head_dim, generator=rng).to(dtype)
        return [q, cache.k_cache, cache.v_cache, cache.block_tables, cache.seq_lens], cache

    return make


@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k_cache", "v_cache"])
def test_misaligned_operands(run, decode_inputs, assert_accurate, which):
    args, cache = decode_inputs()
    args[which] = misaligned(args[which])
    case = Case("misaligned", (70, 9))
    out = run(ops.decode_attention, *args, 0.125)
    assert_accurate(out, lambda *x: plain(case, *x), args[0], cache.keys, cache.values, None)


@pytest.mark.parametrize("scale", [-0.125, 0.0], ids=["negative", "zero"])
@pytest.mark.parametrize("softcap", [0.0, 2.0], ids=["uncapped", "cap2"])
def test_any_scale(run, decode_inputs, assert_accurate, scale, softcap):
    args, cache = decode_inputs()
    case = Case("scale", (70, 9), softcap=softcap)
    out = run(ops.decode_attention, *args, scale, None, 0, softcap)
    signed = args[0] * (scale / 0.125)
    assert_accurate(out, lambda *x: plain(case, *x), signed, cache.keys, cache.values, None)


def test_unused_capacity_changes_nothing(run, decode_inputs):
    """The launch shape comes from the table's width; the lengths are on the device."""
    args, _ = decode_inputs((257, 40))
    wider = args.copy()
    wider[3] = torch.nn.functional.pad(args[3], (0, 500), value=2**30)
    narrow, wide = (run(ops.decode_attention, *x, 0.125, None, 0, 0.0, 4) for x in (args, wider))
    assert torch.equal(narrow, wide)


def test_a_query_without_keys_is_zero(run, decode_inputs):
    """More queries than keys: the first ones come before the first key."""
    args, cache = decode_inputs((3, 9))
    bounds = torch.tensor([0, 7, 9], dtype=torch.int32)
    q = args[0][:1].repeat(9, 1, 1)
    out = run(ops.prefill_attention, q, *args[1:4], bounds, args[4], 7, 0.125)
    assert torch.equal(out[:4], torch.zeros_like(out[:4]))
    case = Case("rest", (3, 9), queries=(3, 2))
    truth = plain(
        case, q[4:].double(), *([x.double() for x in y] for y in (cache.keys, cache.values))
    )
    assert (out[4:] - truth).abs().max() <= 4 * torch.finfo(q.dtype).eps


def test_one_prompt_does_not_depend_on_the_others(run, paged_cache, rng, dtype):
    cache = paged_cache([40, 65, 20], 2, 64, dtype)
    q = torch.randn(70, 8, 64, generator=rng).to(dtype)
    bounds = torch.tensor([0, 30, 65, 70], dtype=torch.int32)

    def prefill(first, last):
        rows = slice(int(bounds[first]), int(bounds[last]))
        return run(
            ops.prefill_attention, q[rows], cache.k_cache, cache.v_cache,
            cache.block_tables[first:last], bounds[first : last + 1] - bounds[first],
            cache.seq_lens[first:last], 35, 0.125,
        )  # fmt: skip

    assert torch.equal(prefill(0, 3)[30:65], prefill(1, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=["bf16"])
def test_too_many_sequences_are_an_error(run, dtype):
    batch = 65536
    q, cache = torch.zeros(batch, 1, 8, dtype=dtype), torch.zeros(1, 1, 16, 8, dtype=dtype)
    table, lengths = torch.zeros(batch, 1).int(), torch.ones(batch).int()
    with pytest.raises(RuntimeError, match="sequences: expected 1 to 65535, got 65536"):
        run(ops.decode_attention, q, cache, cache, table, lengths, 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=["bf16"])
def test_no_query_is_an_error_where_there_are_some(run, decode_inputs):
    args, _ = decode_inputs()
    bounds = torch.tensor([0, 1, 2], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="max_query_len: expected 1 to 2147483647, got 0"):
        run(ops.prefill_attention, *args[:4], bounds, args[4], 0, 0.125)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_too_wide_a_head_is_an_error(run, decode_inputs):
    args, _ = decode_inputs(head_dim=264)
    with pytest.raises(RuntimeError, match="head_dim: expected 1 to 256, got 264"):
        run(ops.decode_attention, *args, 0.1)


def test_splits_agree(run, decode_inputs):
    """However many splits there are, also far more than keys, only rounding changes."""
    args, _ = decode_inputs((257, 1))
    whole, *parts = (
        run(ops.decode_attention, *args, 0.125, None, 0, 0.0, splits) for splits in (1, 2, 5, 1000)
    )
    for part in parts:
        assert (part.float() - whole.float()).abs().max() <= torch.finfo(whole.dtype).eps
        assert torch.equal(part[1], whole[1])
