"""HYBRID_ENGINE_CHECK=1: an index that leads out of memory is an error and not a crash."""

from __future__ import annotations

import pytest
import torch

from hybrid_engine import ops

CACHE = torch.zeros(4, 1, 8, 16)  # 4 blocks of 8


def attention(lengths, tables, bounds=None):
    q = torch.zeros(len(lengths), 2, 16) if bounds is None else torch.zeros(bounds[-1], 2, 16)
    args = (q, CACHE, CACHE, torch.tensor(tables, dtype=torch.int32))
    if bounds is not None:
        args = (*args, torch.tensor(bounds, dtype=torch.int32))
    args = (*args, torch.tensor(lengths, dtype=torch.int32))
    return (*args, 1.0) if bounds is None else (*args, max(bounds), 1.0)


def rope(slots, positions):
    tokens = len(slots)
    table = torch.zeros(5, 16)
    operands = torch.zeros(tokens, 64), None, None, None, table, torch.tensor(positions)
    return (*operands, CACHE.clone(), CACHE.clone(), torch.tensor(slots), 2)


GOOD = [
    (ops.decode_attention, attention([8, 9, 0], [[3, -1], [0, 1], [99, 99]])),
    (ops.prefill_attention, attention([8, 9], [[3, -1], [0, 1]], [0, 8, 10])),
    (ops.rope_and_store_kv, rope([31, -1], [4, 0])),
]
BAD = {
    "block": (
        ops.decode_attention,
        attention([8, 9], [[3, -1], [0, 4]]),
        r"block_tables: expected indices in \[0, 4\), got 4 at \[1, 1\]",
    ),
    "negative_block": (
        ops.decode_attention,
        attention([8, 9], [[3, -1], [0, -1]]),
        r"block_tables: expected indices in \[0, 4\), got -1 at \[1, 1\]",
    ),
    "length": (
        ops.decode_attention,
        attention([17], [[0, 1]]),
        r"seq_lens: expected indices in \[0, 17\), got 17 at \[0\]",
    ),
    "prefill_block": (
        ops.prefill_attention,
        attention([8, 9], [[7, -1], [0, 1]], [0, 8, 10]),
        r"block_tables: expected indices in \[0, 4\), got 7 at \[0, 0\]",
    ),
    "queries": (
        ops.prefill_attention,
        attention([8, 9], [[3, -1], [0, 1]], [0, 9, 10]),
        r"cu_seqlens: expected at most seq_lens\[0\]=8 new tokens, got 9",
    ),
    "slot": (
        ops.rope_and_store_kv,
        rope([31, 32], [4, 0]),
        r"slot_mapping: expected indices in \[0, 32\), got 32 at \[1\]",
    ),
    "position": (
        ops.rope_and_store_kv,
        rope([31, 30], [4, 5]),
        r"positions: expected indices in \[0, 5\), got 5 at \[1\]",
    ),
}


@pytest.mark.parametrize(("op", "args"), GOOD, ids=[op.name for op, _ in GOOD])
def test_what_is_in_bounds_passes(op, args):
    op.validate(*args)


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_names_argument_index_and_bound(name):
    op, args, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        op.validate(*args)


CALL = """
import torch
from hybrid_engine import ops
cache = torch.zeros(4, 1, 8, 16)
qkv, positions, slot = torch.zeros(1, 64), torch.zeros(1).long(), torch.tensor([32])
try:
    if {valid}:
        slot = slot - 1
    ops.rope_and_store_kv(qkv, None, None, None, None, positions, cache, cache.clone(), slot, 2)
    print("called")
except ValueError as error:
    print(error)
"""


def test_the_variable_switches_the_check_on(run_python):
    bad = run_python("-c", CALL.format(valid=False), HYBRID_ENGINE_CHECK="1")
    assert bad.stdout == "slot_mapping: expected indices in [0, 32), got 32 at [0]\n", bad.stderr
    good = run_python("-c", CALL.format(valid=True), HYBRID_ENGINE_CHECK="1")
    assert good.stdout == "called\n", good.stderr


def test_off_by_default_and_nothing_else_is_accepted(run_python):
    off = run_python("-c", CALL.format(valid=True), HYBRID_ENGINE_CHECK="0")
    assert off.stdout == "called\n", off.stderr
    wrong = run_python("-c", CALL.format(valid=True), HYBRID_ENGINE_CHECK="yes")
    assert "ValueError: HYBRID_ENGINE_CHECK='yes': expected 0 or 1" in wrong.stderr
