from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hybrid_engine import ops

EPS = 1e-5
SHAPES = [(1, 1), (2, 7), (3, 63), (5, 257), (33, 288), (1, 4096), (2, 3, 65)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


def plain_rms(x, weight, offset=0.0):
    return F.rms_norm(x, x.shape[-1:], weight + offset, EPS)


def plain_layer(x, weight, bias=None):
    return F.layer_norm(x, x.shape[-1:], weight, bias, EPS)


@pytest.fixture
def make(rng, dtype):
    def tensor(*shape, scale=1.0):
        return (torch.randn(*shape, generator=rng) * scale).to(dtype)

    return tensor


@pytest.mark.isa
@shapes
@pytest.mark.parametrize("offset", [0.0, 1.0], ids=["plain", "gemma"])
def test_rms_norm(run, make, assert_accurate, shape, offset):
    x, weight = make(*shape), make(shape[-1])
    actual = run(ops.rms_norm, x, weight, EPS, offset)
    assert_accurate(actual, lambda x, w: plain_rms(x, w, offset), x, weight)


@pytest.mark.isa
@shapes
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
def test_layer_norm(run, make, assert_accurate, shape, with_bias):
    # An offset far from zero: a variance by E[x^2] - E[x]^2 would cancel.
    x, weight, bias = make(*shape) + 10, make(shape[-1]), make(shape[-1])
    inputs = (x, weight, bias if with_bias else None)
    assert_accurate(run(ops.layer_norm, *inputs, EPS), plain_layer, *inputs)


@shapes
def test_add_norms_round_the_sum_once_and_normalise_it(run, make, shape):
    x, weight, bias = make(*shape), make(shape[-1]), make(shape[-1])
    for fused, single, args in (
        (ops.add_rms_norm, ops.rms_norm, (weight, EPS)),
        (ops.add_layer_norm, ops.layer_norm, (weight, bias, EPS)),
    ):
        residual = make(*shape)
        expected_sum = residual + x
        actual = run(fused, x, residual, *args)
        assert torch.equal(residual, expected_sum)
        assert torch.equal(actual, run(single, expected_sum, *args))


def test_extreme_rows(run, assert_accurate, dtype):
    """Zeros, the largest finite values, subnormals; infinity and NaN stay in their rows."""
    top = min(torch.finfo(dtype).max, 1e18)
    tiny = max(torch.finfo(dtype).tiny, 1e-30) / 4
    rows = torch.tensor([[0.0] * 9, [top] * 9, [-top, top] * 4 + [0.0], [tiny] * 9, [1.0] * 9])
    x, weight = rows.to(dtype), torch.ones(9, dtype=dtype)
    assert_accurate(run(ops.rms_norm, x, weight, EPS), plain_rms, x, weight)
    bad = x.clone()
    bad[0, 3], bad[1, 0] = float("nan"), float("inf")
    for op, args in ((ops.rms_norm, (weight, EPS)), (ops.layer_norm, (weight, None, EPS))):
        actual = run(op, bad, *args)
        assert actual[0].isnan().all()
        assert not actual[1].isfinite().all()
        assert torch.equal(actual[2:], run(op, x, *args)[2:])


def test_empty(run, make):
    weight = make(8)
    assert run(ops.rms_norm, make(0, 8), weight, EPS).shape == (0, 8)
    assert run(ops.layer_norm, make(2, 0, 8), weight, None, EPS).shape == (2, 0, 8)
    assert run(ops.add_rms_norm, make(0, 8), make(0, 8), weight, EPS).shape == (0, 8)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"weight": torch.ones(9)}, r"weight: expected \[8\], got \[9\]"),
        ({"weight": torch.ones(1, 8)}, r"weight: expected \[8\], got \[1, 8\]"),
        ({"weight": torch.ones(8).half()}, "weight: expected float32, got float16"),
        ({"x": torch.ones(8, 3).t()}, "x: expected a contiguous tensor"),
        ({"x": torch.ones(3, 8).double()}, "x: expected float32, bfloat16 or float16, got float64"),
        ({"x": torch.tensor(1.0)}, "x: expected at least one dimension, got a scalar"),
        ({"residual": torch.ones(3, 9)}, r"residual: expected \[3, 8\], got \[3, 9\]"),
    ],
    ids=["size", "rank", "dtype", "layout", "float64", "scalar", "residual"],
)
def test_bad_input_names_argument_and_values(run, changed, message):
    args = {"x": torch.ones(3, 8), "residual": torch.ones(3, 8), "weight": torch.ones(8)}
    with pytest.raises((ValueError, RuntimeError), match=message):
        run(ops.add_rms_norm, *(args | changed).values(), EPS)


def test_opcheck(make):
    x, weight, bias = make(3, 9), make(9), make(9)
    torch.library.opcheck(ops.rms_norm.overload, (x, weight, EPS, 1.0))
    torch.library.opcheck(ops.layer_norm.overload, (x, weight, bias, EPS))
    torch.library.opcheck(ops.add_rms_norm.overload, (x, make(3, 9), weight, EPS))
    torch.library.opcheck(ops.add_layer_norm.overload, (x, make(3, 9), weight, None, EPS))
