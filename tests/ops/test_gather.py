from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hybrid_engine import ops
from hybrid_engine.ops import UnpackEntry, unpack_plan

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


class Bucket:
    """Parameters partitioned as ZeRO-3 does it, padding NaN, and all-gathered."""

    def __init__(self, parameters, world):
        parts, self.entries, source = [], [], 0
        for p in parameters:
            partition = -(-p.numel() // world)
            padded = torch.full((world * partition,), float("nan"), dtype=p.dtype)
            padded[: p.numel()] = p.flatten()
            parts.append(padded.view(world, partition))
            rows, columns = p.shape if p.dim() == 2 else (len(p), 1)
            whole = (0, 0, 0, rows, 0, columns)
            self.entries.append(UnpackEntry(source, partition, rows, columns, *whole))
            source += partition
        self.data = torch.cat(parts, 1)  # (world, L)


@pytest.fixture
def make(rng, dtype):
    def tensor(*shape):
        return torch.randn(*shape, generator=rng).to(dtype)

    return tensor


def empty(*shape, dtype):
    return torch.full(shape, float("nan"), dtype=dtype)


@pytest.mark.isa
@pytest.mark.parametrize("world", [1, 2, 3, 8], ids=lambda w: f"W{w}")
def test_whole_parameters_arrive_bit_for_bit(run, make, dtype, world):
    parameters = [make(7, 9), make(1), make(63, 257), make(257), make(2, 1), make(5, 64)]
    bucket = Bucket(parameters, world)
    plan = [replace(entry, destination=i) for i, entry in enumerate(bucket.entries)]
    destinations = [empty(*p.shape, dtype=dtype) for p in parameters]
    run(ops.gather_unpack, bucket.data, unpack_plan(plan), destinations, [], [], [])
    for found, expected in zip(destinations, parameters, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.isa
@pytest.mark.parametrize("to", DTYPES, ids=["to_fp32", "to_bf16", "to_fp16"])
def test_casts_round_as_torch_does(run, make, dtype, to):
    parameter = make(33, 65)
    parameter[0, :3] = torch.tensor([float("inf"), 1e-7, -0.0]).to(dtype)
    bucket, destination = Bucket([parameter], 3), empty(33, 65, dtype=to)
    run(ops.gather_unpack, bucket.data, unpack_plan(bucket.entries), [destination], [], [], [])
    assert torch.equal(destination, parameter.to(to))


def test_qkv_and_gate_up_fuse_by_destination_row(run, make, dtype):
    q, k, v, bias_q, bias_k = make(16, 24), make(8, 24), make(8, 24), make(16), make(8)
    bucket = Bucket([q, bias_q, k, v, bias_k], 3)
    entry_q, entry_bias_q, entry_k, entry_v, entry_bias_k = bucket.entries
    plan = [
        entry_q,
        replace(entry_k, destination_row=16),
        replace(entry_v, destination_row=24),
        replace(entry_bias_q, destination=1),
        replace(entry_bias_k, destination=1, destination_row=16),
    ]
    weight, bias = empty(32, 24, dtype=dtype), empty(25, dtype=dtype)
    run(ops.gather_unpack, bucket.data, unpack_plan(plan), [weight, bias], [], [], [])
    assert torch.equal(weight, torch.cat((q, k, v)))
    assert torch.equal(bias[:24], torch.cat((bias_q, bias_k)))
    assert bias[24].isnan()


@pytest.mark.parametrize("rank", [0, 1, 2], ids=lambda r: f"TP{r}")
def test_tensor_parallel_slices_by_row_and_by_column(run, make, dtype, rank):
    weight, bias = make(12, 33), make(12)
    bucket = Bucket([weight, bias], 2)
    entry, entry_bias = bucket.entries
    rows, columns = (4 * rank, 4 * rank + 4), (11 * rank, 11 * rank + 11)
    plan = [
        replace(entry, row_begin=rows[0], row_end=rows[1]),
        replace(entry, destination=1, column_begin=columns[0], column_end=columns[1]),
        replace(entry_bias, destination=2, row_begin=rows[0], row_end=rows[1]),
    ]
    destinations = [empty(4, 33, dtype=dtype), empty(12, 11, dtype=dtype), empty(4, dtype=dtype)]
    run(ops.gather_unpack, bucket.data, unpack_plan(plan), destinations, [], [], [])
    expected = weight[slice(*rows)], weight[:, slice(*columns)], bias[slice(*rows)]
    for found, part in zip(destinations, expected, strict=True):
        assert torch.equal(found, part)


@pytest.mark.isa
@pytest.mark.parametrize("world", [1, 3], ids=lambda w: f"W{w}")
@pytest.mark.parametrize("factors", DTYPES[:2], ids=["lora_fp32", "lora_bf16"])
def test_lora_is_merged_before_the_one_rounding(run, make, dtype, assert_accurate, world, factors):
    weight, frozen = make(33, 65), make(33, 65)
    a, b = make(4, 65).to(factors), make(33, 4).to(factors)
    bucket = Bucket([weight, frozen], world)
    columns = {"column_begin": 5, "column_end": 60}
    plan = [
        replace(bucket.entries[0], lora=0, **columns),
        replace(bucket.entries[1], destination_row=33, **columns),
    ]
    out = empty(66, 55, dtype=dtype)
    run(ops.gather_unpack, bucket.data, unpack_plan(plan), [out], [a], [b], [0.5])
    assert torch.equal(out[33:], frozen[:, 5:60])

    def plain(weight, a, b):
        return weight[:, 5:60] + 0.5 * (b @ a).to(weight.dtype)[:, 5:60]

    assert_accurate(out[:33], plain, weight, a, b)


def test_large_parameters_are_cut_into_pieces(run, make, dtype):
    """More elements than one thread's piece, with rank borders in the middle of rows."""
    weight = make(517, 131)
    bucket, out = Bucket([weight], 7), empty(517, 131, dtype=dtype)
    run(ops.gather_unpack, bucket.data, unpack_plan(bucket.entries), [out], [], [], [])
    assert torch.equal(out, weight)


def test_empty(run, make, dtype):
    bucket = Bucket([make(4, 4)], 2)
    run(ops.gather_unpack, bucket.data, unpack_plan([]), [], [], [], [])
    out = empty(0, 4, dtype=dtype)
    plan = unpack_plan([replace(bucket.entries[0], row_end=0)])
    run(ops.gather_unpack, bucket.data, plan, [out], [], [], [])


GOOD = UnpackEntry(0, 8, 4, 4, 0, 0, 0, 4, 0, 4)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (replace(GOOD, source=13), r"entry 0: source: expected a value in \[0, 12\], got 13"),
        (replace(GOOD, partition=21), r"entry 0: partition: .*\[1, 20\], got 21"),
        (replace(GOOD, rows=5), r"entry 0: 20 elements do not fit in 2 partitions of 8"),
        (replace(GOOD, row_end=5), r"entry 0: row_end: .*\[0, 4\], got 5"),
        (replace(GOOD, column_begin=-1), r"entry 0: column_begin: .*\[0, 4\], got -1"),
        (replace(GOOD, destination=1), r"entry 0: destination: .*\[0, 0\], got 1"),
        (replace(GOOD, destination_row=1), r"entry 0: destination_row: .*\[0, 0\], got 1"),
        (replace(GOOD, column_end=3), "destinations: entry 0: expected 3 columns, got 4"),
        (replace(GOOD, lora=0), r"entry 0: lora: .*\[-1, -1\], got 0"),
    ],
    ids=lambda value: "" if isinstance(value, UnpackEntry) else None,
)
def test_bad_plan_names_entry_and_value(run, entry, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        run(
            ops.gather_unpack,
            torch.ones(2, 20),
            unpack_plan([entry]),
            [torch.ones(4, 4)],
            [],
            [],
            [],
        )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bucket": torch.ones(2, 20).double()}, "bucket: expected float32, bfloat16 or float16"),
        ({"bucket": torch.ones(40)}, r"bucket: expected \[any, any\], got \[40\]"),
        ({"plan": torch.ones(1, 10).long()}, r"plan: expected \[any, 11\], got \[1, 10\]"),
        ({"plan": torch.ones(1, 11)}, "plan: expected int64, got float32"),
        ({"destinations": [torch.ones(4, 4).t()]}, "destinations: expected a contiguous tensor"),
        ({"destinations": [torch.ones(1, 4, 4)]}, r"destinations: expected vectors and matrices"),
        ({"lora_a": [torch.ones(2, 4)]}, "lora_b, lora_scales: expected 1 of each"),
    ],
    ids=["dtype", "rank", "plan", "plan_dtype", "layout", "cube", "pairs"],
)
def test_bad_input_names_argument_and_values(run, changed, message):
    args = {
        "bucket": torch.ones(2, 20),
        "plan": unpack_plan([GOOD]),
        "destinations": [torch.ones(4, 4)],
        "lora_a": [],
    }
    args |= changed
    if "destinations" in changed and changed["destinations"][0].is_contiguous() is False:
        args["destinations"] = [torch.ones(4, 8)[:, :4]]
    with pytest.raises((ValueError, RuntimeError), match=message):
        run(ops.gather_unpack, *args.values(), [], [])


def test_opcheck(make):
    bucket = Bucket([make(4, 5)], 2)
    plan = unpack_plan([replace(bucket.entries[0], lora=0)])
    args = (bucket.data, plan, [make(4, 5)], [make(2, 5)], [make(4, 2)], [0.5])
    # The plan is read on the host, so it has no meaning under a fake mode.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(ops.gather_unpack.overload, args, test_utils=checks)
