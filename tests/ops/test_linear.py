from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hybrid_engine import ops

SHAPES = [(1, 1, 1), (1, 7, 63), (2, 5, 257), (3, 63, 64), (4, 33, 288), (7, 257, 65), (16, 9, 512)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-O{}-I{}".format(*s))
with_bias = pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])


@pytest.fixture
def make(rng, dtype):
    def tensor(*shape):
        return torch.randn(*shape, generator=rng).to(dtype)

    return tensor


@pytest.mark.isa
@shapes
@with_bias
def test_skinny_linear(run, make, assert_accurate, shape, with_bias):
    rows, out_dim, in_dim = shape
    x, weight = make(rows, in_dim), make(out_dim, in_dim)
    bias = make(out_dim) if with_bias else None
    assert_accurate(run(ops.skinny_linear, x, weight, bias), F.linear, x, weight, bias)


@pytest.mark.parametrize("rows", range(1, 17), ids=lambda rows: f"B{rows}")
def test_every_row_count(run, make, assert_accurate, rows):
    x, weight = make(rows, 96), make(10, 96)
    assert_accurate(run(ops.skinny_linear, x, weight), F.linear, x, weight)


def test_leading_dimensions_are_rows(run, make):
    x, weight = make(2, 3, 65), make(9, 65)
    flat = run(ops.skinny_linear, x.view(6, 65), weight)
    assert torch.equal(run(ops.skinny_linear, x, weight), flat.view(2, 3, 9))


def test_a_row_does_not_depend_on_its_batch(run, make):
    x, weight, bias = make(13, 257), make(33, 257), make(33)
    whole = run(ops.skinny_linear, x, weight, bias)
    for row in (0, 5, 12):
        alone = run(ops.skinny_linear, x[row : row + 1], weight, bias)
        if run.name == "reference":  # torch's product picks its order of summation by shape
            torch.testing.assert_close(alone[0], whole[row])
        else:
            assert torch.equal(alone[0], whole[row])


def test_extreme_values_stay_in_their_row(run, make):
    x, weight = make(5, 63), make(9, 63)
    clean = run(ops.skinny_linear, x, weight)
    x[1, 5], x[3, 62] = float("inf"), float("nan")
    out = run(ops.skinny_linear, x, weight)
    assert not out[1].isfinite().any()
    assert out[3].isnan().all()
    assert torch.equal(out[[0, 2, 4]], clean[[0, 2, 4]])


def test_empty(run, make):
    assert run(ops.skinny_linear, make(0, 8), make(5, 8)).shape == (0, 5)
    assert run(ops.skinny_linear, make(3, 8), make(0, 8)).shape == (3, 0)
    assert torch.equal(run(ops.skinny_linear, make(2, 0), make(3, 0), make(3) * 0), make(2, 3) * 0)
    out = run(ops.fused_lora, make(0, 8), make(5, 8), None, [make(2, 8)], [make(5, 2)], [1.0])
    assert out.shape == (0, 5)


def plain_lora(x, weight, bias, a, b, scales, index):
    out = F.linear(x, weight, bias)
    for i in range(len(a)):
        term = F.linear(F.linear(x, a[i]), b[i]) * scales[i]
        out = out + (term if index is None else torch.where((index == i)[:, None], term, 0.0))
    return out


RANKS = {"none": [], "r1": [1], "r8": [8], "mixed": [4, 16, 7]}


@pytest.mark.isa
@pytest.mark.parametrize("rows", [1, 3, 7, 16, 33], ids=lambda rows: f"B{rows}")
@pytest.mark.parametrize("indexed", [True, False], ids=["indexed", "summed"])
@pytest.mark.parametrize("name", RANKS)
def test_fused_lora(run, make, rng, assert_accurate, rows, indexed, name):
    ranks, in_dim, out_dim = RANKS[name], 129, 65
    a, b = [make(r, in_dim) for r in ranks], [make(out_dim, r) for r in ranks]
    scales = [0.5 + i for i in range(len(ranks))]
    index = torch.randint(-1, max(1, len(ranks)), (rows,), generator=rng).int()
    inputs = (make(rows, in_dim), make(out_dim, in_dim), make(out_dim), a, b, scales)
    inputs = (*inputs, index if indexed else None)
    assert_accurate(run(ops.fused_lora, *inputs), plain_lora, *inputs)


def test_rows_without_adapter_get_the_base_layer_bit_for_bit(run, make):
    x, weight, bias = make(6, 65), make(33, 65), make(33)
    a, b = [make(4, 65)], [make(33, 4)]
    index = torch.tensor([0, -1, 0, -1, 5, -1], dtype=torch.int32)
    out = run(ops.fused_lora, x, weight, bias, a, b, [2.0], index)
    base = run(ops.fused_lora, x, weight, bias, [], [], [])
    assert torch.equal(out[[1, 3, 4, 5]], base[[1, 3, 4, 5]])
    assert not torch.equal(out[[0, 2]], base[[0, 2]])


def arguments():
    return {
        "x": torch.ones(3, 8),
        "weight": torch.ones(5, 8),
        "bias": torch.ones(5),
        "lora_a": [torch.ones(2, 8)],
        "lora_b": [torch.ones(5, 2)],
        "scales": [1.0],
        "adapter_index": torch.zeros(3, dtype=torch.int32),
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": torch.ones(3, 8).double()}, "x: expected float32, bfloat16 or float16, got float64"),
        ({"x": torch.ones(8, 3).t()}, "x: expected a contiguous tensor"),
        ({"weight": torch.ones(5, 9)}, r"weight: expected \[any, 8\], got \[5, 9\]"),
        ({"weight": torch.ones(5, 8).half()}, "weight: expected float32, got float16"),
        ({"bias": torch.ones(6)}, r"bias: expected \[5\], got \[6\]"),
        ({"lora_a": [torch.ones(2, 9)]}, r"lora_a: expected \[any, 8\], got \[2, 9\]"),
        ({"lora_b": [torch.ones(5, 3)]}, r"lora_b: expected \[5, 2\], got \[5, 3\]"),
        ({"lora_b": []}, "lora_b: expected 1 tensors, as many as lora_a, got 0"),
        ({"scales": [1.0, 2.0]}, "scales: expected 1 values, as many as lora_a, got 2"),
        ({"adapter_index": torch.zeros(3).long()}, "adapter_index: expected int32, got int64"),
        ({"adapter_index": torch.zeros(4).int()}, r"adapter_index: expected \[3\], got \[4\]"),
    ],
    ids=[
        "float64",
        "layout",
        "weight",
        "dtype",
        "bias",
        "a",
        "b",
        "pairs",
        "scales",
        "int64",
        "index",
    ],
)
def test_bad_input_names_argument_and_values(run, changed, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        run(ops.fused_lora, *(arguments() | changed).values())


def test_too_many_rows(run):
    with pytest.raises((ValueError, RuntimeError), match="x: expected at most 16 rows, got 17"):
        run(ops.skinny_linear, torch.ones(17, 8), torch.ones(5, 8))


def test_opcheck(make):
    x, weight, bias = make(3, 9), make(5, 9), make(5)
    torch.library.opcheck(ops.skinny_linear.overload, (x, weight, bias))
    lora = ([make(2, 9)], [make(5, 2)], [0.5])
    torch.library.opcheck(ops.fused_lora.overload, (x, weight, bias, *lora))
    index = torch.tensor([0, -1, 0], dtype=torch.int32)
    torch.library.opcheck(ops.fused_lora.overload, (x, weight, None, *lora, index))
