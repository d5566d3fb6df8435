"""norm.cu on the CPU: the tests of the op, then the sizes at which the kernel changes its path."""

from __future__ import annotations

import pytest
import torch

from hybrid_engine import ops
from tests.cuda.layout import misaligned
from tests.ops import test_norm as shared

FAMILY = "norm"

make = shared.make
test_rms_norm = shared.test_rms_norm
test_layer_norm = shared.test_layer_norm
test_add_norms_round_the_sum_once_and_normalise_it = (
    shared.test_add_norms_round_the_sum_once_and_normalise_it
)
test_extreme_rows = shared.test_extreme_rows
test_empty = shared.test_empty

# A warp to a row up to 512, a block up to 16384, then rows that registers cannot hold; with and
# without whole packs.
DIMS = [504, 513, 520, 16384, 16387, 20000]


@pytest.mark.parametrize("dim", DIMS, ids=lambda d: f"D{d}")
def test_every_path(run, make, assert_accurate, dim):
    x, weight, bias = make(3, dim) + 10, make(dim), make(dim)
    assert_accurate(run(ops.rms_norm, x, weight, shared.EPS), shared.plain_rms, x, weight)
    actual = run(ops.layer_norm, x, weight, bias, shared.EPS)
    assert_accurate(actual, shared.plain_layer, x, weight, bias)
    residual = make(3, dim)
    total = x + residual
    fused = run(ops.add_layer_norm, x, residual, weight, bias, shared.EPS)
    assert torch.equal(residual, total)
    assert torch.equal(fused, run(ops.layer_norm, total, weight, bias, shared.EPS))


@pytest.mark.parametrize("dim", [64, 1024, 16416], ids=lambda d: f"D{d}")
def test_misaligned_rows_give_the_same_bits(run, make, dim):
    args = make(3, dim), make(3, dim), make(dim)
    shifted = tuple(map(misaligned, args))
    expected = run(ops.add_rms_norm, *args, shared.EPS)
    assert torch.equal(run(ops.add_rms_norm, *shifted, shared.EPS), expected)
    assert torch.equal(shifted[1], args[1])
