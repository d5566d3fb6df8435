from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hybrid_engine import ops

SHAPES = [(1, 1), (2, 7), (3, 63), (5, 257), (33, 288), (1, 11008), (2, 3, 65)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
approximations = pytest.mark.parametrize("tanh", [False, True], ids=["erf", "tanh"])


def gelu(x, tanh):
    return F.gelu(x, approximate="tanh" if tanh else "none")


def gate_and_up(x):
    return x.chunk(2, -1)


@pytest.fixture
def make(rng, dtype):
    def tensor(*shape):
        return (torch.randn(*shape, generator=rng) * 3).to(dtype)

    return tensor


@pytest.mark.isa
@shapes
def test_silu_and_mul(run, make, assert_accurate, shape):
    def plain(x):
        gate, up = gate_and_up(x)
        return F.silu(gate) * up

    x = make(*shape[:-1], 2 * shape[-1])
    assert_accurate(run(ops.silu_and_mul, x), plain, x)


@pytest.mark.isa
@shapes
@approximations
def test_gelu_and_mul(run, make, assert_accurate, shape, tanh):
    def plain(x):
        gate, up = gate_and_up(x)
        return gelu(gate, tanh) * up

    x = make(*shape[:-1], 2 * shape[-1])
    assert_accurate(run(ops.gelu_and_mul, x, tanh), plain, x)


@pytest.mark.isa
@shapes
@approximations
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
def test_bias_gelu(run, make, assert_accurate, shape, tanh, with_bias):
    def plain(x, bias):
        return gelu(x if bias is None else x + bias, tanh)

    x, bias = make(*shape), make(shape[-1]) if with_bias else None
    assert_accurate(run(ops.bias_gelu, x, bias, tanh), plain, x, bias)


@pytest.mark.isa
@shapes
def test_relu_is_bitwise(run, make, shape):
    x = make(*shape)
    assert torch.equal(run(ops.relu, x), F.relu(x))


def extremes(dtype):
    info = torch.finfo(dtype)
    values = [
        0.0,
        -0.0,
        info.tiny,
        -info.tiny,
        20.0,
        -20.0,
        90.0,
        -90.0,
        1e4,
        -1e4,
        info.max,
        info.min,
    ]
    inf = float("inf")
    return torch.tensor([*values, inf, float("nan")], dtype=torch.float64).to(dtype)


def test_extreme_values(run, assert_accurate, dtype):
    x = extremes(dtype)
    for tanh in (False, True):
        finite = x[:-2]  # torch's own erf form is NaN at infinity
        assert_accurate(
            run(ops.bias_gelu, finite, None, tanh), lambda x, t=tanh: gelu(x, t), finite
        )
    gated = torch.cat((x, torch.ones_like(x)))
    assert_accurate(run(ops.silu_and_mul, gated), lambda x: F.silu(gate_and_up(x)[0]), gated)
    relu = run(ops.relu, x)
    assert torch.equal(relu.nan_to_num(7.0), F.relu(x).nan_to_num(7.0))
    assert relu[-1].isnan()


def test_near_zero_keeps_relative_accuracy(run):
    """tanh and erf are odd: their errors near zero are relative, not absolute."""
    x = torch.logspace(-20, -1, 200)
    x = torch.cat((x, -x))
    for tanh in (False, True):
        truth = gelu(x.double(), tanh)
        actual = run(ops.bias_gelu, x, None, tanh).double()
        assert ((actual - truth) / truth).abs().max() <= 4 * torch.finfo(torch.float32).eps


def test_empty(run, make):
    assert run(ops.silu_and_mul, make(0, 8)).shape == (0, 4)
    assert run(ops.gelu_and_mul, make(3, 0)).shape == (3, 0)
    assert run(ops.bias_gelu, make(0, 8), None).shape == (0, 8)
    assert run(ops.relu, make(0)).shape == (0,)


@pytest.mark.parametrize(
    ("op", "args", "message"),
    [
        (ops.silu_and_mul, (torch.ones(2, 7),), r"x: expected an even last dimension.*\[2, 7\]"),
        (ops.gelu_and_mul, (torch.ones(8, 2).t(),), "x: expected a contiguous tensor"),
        (ops.bias_gelu, (torch.ones(2, 7), torch.ones(8)), r"bias: expected \[7\], got \[8\]"),
        (
            ops.bias_gelu,
            (torch.ones(2, 7), torch.ones(7).half()),
            "bias: expected float32, got float16",
        ),
        (ops.relu, (torch.ones(2).int(),), "x: expected float32, bfloat16 or float16, got int32"),
    ],
    ids=["odd", "layout", "size", "dtype", "integer"],
)
def test_bad_input_names_argument_and_values(run, op, args, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        run(op, *args)


def test_opcheck(make):
    x = make(3, 14)
    torch.library.opcheck(ops.silu_and_mul.overload, (x,))
    torch.library.opcheck(ops.gelu_and_mul.overload, (x, True))
    torch.library.opcheck(ops.bias_gelu.overload, (x, make(14), False))
    torch.library.opcheck(ops.relu.overload, (x,))
