"""rope.cu on the CPU: the tests of the op, then the head sizes that take other paths."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hybrid_engine import ops
from tests.cuda.layout import misaligned
from tests.ops import test_rope as shared

FAMILY = "rope"

make = shared.make
test_queries_and_stored_keys_and_values = shared.test_queries_and_stored_keys_and_values
test_what_has_no_slot_stays_untouched = shared.test_what_has_no_slot_stays_untouched
test_without_rotation_norm_and_bias_data_only_moves = (
    shared.test_without_rotation_norm_and_bias_data_only_moves
)
test_extreme_values_stay_in_their_head = shared.test_extreme_values_stay_in_their_head
test_empty = shared.test_empty

PATHS = [
    shared.Case("ragged_pairs", rotary=20, bias=True),  # a half is no whole pack
    shared.Case("ragged_gptj", rotary=20, interleaved=True, norms=True),
    shared.Case("long_head", head_dim=576, rotary=64, norms=True),  # several units to a lane
    shared.Case("many_heads", tokens=3, heads=40, kv_heads=8, head_dim=128, rotary=128),  # blocks
    shared.Case("tiny", tokens=3, heads=3, head_dim=2, rotary=2, norms=True),  # one lane to a head
]
paths = pytest.mark.parametrize("case", PATHS, ids=lambda c: c.name)


@paths
def test_every_path(run, make, assert_accurate, case):
    shared.test_queries_and_stored_keys_and_values(run, make, assert_accurate, case)


@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "gptj"])
def test_misaligned_rows_give_the_same_bits(run, make, interleaved):
    aligned = make(shared.Case("all", bias=True, norms=True, interleaved=interleaved))
    shifted = replace(
        aligned,
        **{
            name: misaligned(getattr(aligned, name))
            for name in ("qkv", "bias", "q_norm", "k_norm", "k_cache", "v_cache")
        },
    )
    expected = run(ops.rope_and_store_kv, *aligned.args())
    assert torch.equal(run(ops.rope_and_store_kv, *shifted.args()), expected)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(
            getattr(shifted, name).view(torch.uint8), getattr(aligned, name).view(torch.uint8)
        )
