"""linear.cu: the tests of its ops, then the sizes at which the launcher changes its path."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hybrid_engine import ops
from tests.cuda.layout import misaligned
from tests.ops import test_linear as shared

FAMILY = "linear"
ORDERS = ("random", "greedy")

make = shared.make
test_skinny_linear = shared.test_skinny_linear
test_every_row_count = shared.test_every_row_count
test_leading_dimensions_are_rows = shared.test_leading_dimensions_are_rows
test_extreme_values_stay_in_their_row = shared.test_extreme_values_stay_in_their_row
test_empty = shared.test_empty
test_fused_lora = shared.test_fused_lora
test_rows_without_adapter_get_the_base_layer_bit_for_bit = (
    shared.test_rows_without_adapter_get_the_base_layer_bit_for_bit
)

tensor_cores = pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"]
)

# Columns of a block: 8, 16 and 32, by the multiprocessors, of which the emulator has four.
OUT_DIMS = [3, 63, 65, 127, 129, 161]
if torch.cuda.is_available():
    processors = torch.cuda.get_device_properties(0).multi_processor_count
    OUT_DIMS += [16 * processors + 1, 32 * processors + 1]
# The inner dimension in steps of 32 of a warp, and of 512 or 1024 of a block.
IN_DIMS = [8, 40, 512, 520, 1032]


def lora(make, rows, out_dim, in_dim, ranks):
    a, b = [make(rank, in_dim) for rank in ranks], [make(out_dim, rank) for rank in ranks]
    return make(rows, in_dim), make(out_dim, in_dim), make(out_dim), a, b, [0.5] * len(ranks)


@pytest.mark.parametrize("out_dim", OUT_DIMS, ids=lambda d: f"O{d}")
def test_every_block_width(run, make, assert_accurate, out_dim):
    x, weight, bias = make(9, 64), make(out_dim, 64), make(out_dim)
    assert_accurate(run(ops.skinny_linear, x, weight, bias), F.linear, x, weight, bias)


@pytest.mark.parametrize("in_dim", IN_DIMS, ids=lambda d: f"I{d}")
def test_every_depth(run, make, assert_accurate, in_dim):
    for out_dim in (9, 70):
        x, weight = make(3, in_dim), make(out_dim, in_dim)
        assert_accurate(run(ops.skinny_linear, x, weight), F.linear, x, weight)


# Rows of a tensor-core block, of a small tile and of a large one; each with one row more.
@pytest.mark.parametrize("rows", [5, 16, 17, 64, 65, 129], ids=lambda rows: f"B{rows}")
@pytest.mark.parametrize("indexed", [True, False], ids=["indexed", "summed"])
@tensor_cores
def test_adapters_on_the_tensor_cores(run, make, rng, assert_accurate, rows, indexed):
    inputs = lora(make, rows, 66, 72, ranks=[8, 3, 40])
    index = torch.randint(-1, 4, (rows,), generator=rng).int() if indexed else None
    out = run(ops.fused_lora, *inputs, index)
    assert_accurate(out, shared.plain_lora, *inputs, index)


@pytest.mark.parametrize("out_dim", [1, 63, 128, 131], ids=lambda d: f"O{d}")
@pytest.mark.parametrize("rows", [33, 70], ids=lambda rows: f"B{rows}")
@tensor_cores
def test_tiles_with_ragged_edges(run, make, assert_accurate, rows, out_dim):
    inputs = lora(make, rows, out_dim, 200, ranks=[4])
    assert_accurate(run(ops.fused_lora, *inputs), shared.plain_lora, *inputs, None)


@pytest.mark.parametrize("rows", [3, 20], ids=lambda rows: f"B{rows}")
@pytest.mark.parametrize("which", ["x", "weight", "a"])
def test_misaligned_operands(run, make, assert_accurate, which, rows):
    x, weight, bias, a, b, scales = lora(make, rows, 34, 64, ranks=[8])
    if which == "x":
        x = misaligned(x)
    elif which == "weight":
        weight = misaligned(weight)
    else:
        a = [misaligned(a[0])]
    inputs = (x, weight, bias, a, b, scales)
    assert_accurate(run(ops.fused_lora, *inputs), shared.plain_lora, *inputs, None)


@pytest.mark.parametrize("rows", [6, 40, 70], ids=lambda rows: f"B{rows}")
def test_an_adapter_reaches_only_its_rows(run, make, rows):
    """Also one that is broken: where a row does not use it, its NaN is not multiplied by 0."""
    inputs = lora(make, rows, 20, 64, ranks=[4, 4])
    for broken in (inputs[3][1], inputs[4][1]):
        broken.fill_(float("nan"))
    index = torch.zeros(rows, dtype=torch.int32)
    clean = run(ops.fused_lora, *inputs, index)
    index[3] = 1
    out = run(ops.fused_lora, *inputs, index)
    assert out[3].isnan().all()
    out[3] = clean[3]
    assert torch.equal(out, clean)


@tensor_cores
def test_the_low_rank_product_is_not_rounded(run, dtype):
    """x a^T has more digits than the element type: b takes the leading ones away."""
    for rows in (4, 20):
        x = torch.zeros(rows, 64, dtype=dtype)
        x[:, 0], x[:, 1] = 1.0, 2.0**-11
        a = torch.zeros(2, 64, dtype=dtype)
        a[0, :2], a[1, 0] = 1.0, 1.0  # 1 + 2^-11 and 1
        b = torch.tensor([[1.0, -1.0]], dtype=dtype)
        out = run(ops.fused_lora, x, torch.zeros(1, 64, dtype=dtype), None, [a], [b], [1.0])
        assert torch.equal(out, torch.full((rows, 1), 2.0**-11, dtype=dtype))
