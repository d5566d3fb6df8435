"""gather.cu on the CPU: the tests of the op, then more entries than one launch takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hybrid_engine import ops
from hybrid_engine.ops import unpack_plan
from tests.ops import test_gather as shared

FAMILY = "gather"
ORDERS = ("forward", "random")  # no thread waits for another: only their order can differ

make = shared.make
test_whole_parameters_arrive_bit_for_bit = shared.test_whole_parameters_arrive_bit_for_bit
test_casts_round_as_torch_does = shared.test_casts_round_as_torch_does
test_qkv_and_gate_up_fuse_by_destination_row = shared.test_qkv_and_gate_up_fuse_by_destination_row
test_tensor_parallel_slices_by_row_and_by_column = (
    shared.test_tensor_parallel_slices_by_row_and_by_column
)
test_lora_is_merged_before_the_one_rounding = shared.test_lora_is_merged_before_the_one_rounding
test_large_parameters_are_cut_into_pieces = shared.test_large_parameters_are_cut_into_pieces
test_empty = shared.test_empty


@pytest.mark.parametrize("entries", [32, 33, 70], ids=lambda n: f"P{n}")
def test_any_number_of_entries(run, make, dtype, entries):
    parameters = [make(3, 8 + i) for i in range(entries)]
    bucket = shared.Bucket(parameters, 2)
    plan = [replace(entry, destination=i) for i, entry in enumerate(bucket.entries)]
    plan[5] = replace(plan[5], row_end=0)  # nothing of it, between entries that have something
    destinations = [shared.empty(*p.shape, dtype=dtype) for p in parameters]
    run(ops.gather_unpack, bucket.data, unpack_plan(plan), destinations, [], [], [])
    for i, (found, expected) in enumerate(zip(destinations, parameters, strict=True)):
        assert found.isnan().all() if i == 5 else torch.equal(found, expected)


@pytest.mark.parametrize("world", [1, 2], ids=lambda w: f"W{w}")
def test_merging_rows_by_fours(run, make, dtype, assert_accurate, world):
    """Whole packs, and a last group of rows that is not full."""
    weight, a, b = make(18, 64), make(16, 64), make(18, 16)
    bucket, out = shared.Bucket([weight], world), shared.empty(18, 64, dtype=dtype)
    plan = unpack_plan([replace(bucket.entries[0], lora=0)])
    run(ops.gather_unpack, bucket.data, plan, [out], [a], [b], [0.25])
    assert_accurate(out, lambda w, a, b: w + 0.25 * (b @ a), weight, a, b)
