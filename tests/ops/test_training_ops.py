"""rms_norm, swiglu and rope with their gradients, against plain PyTorch in fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_engine import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DEVICES = ["cpu"] + [pytest.param("cuda", marks=pytest.mark.gpu)] * torch.cuda.is_available()
EPS = 1e-6

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
devices = pytest.mark.parametrize("device", DEVICES)


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * (weight + weight_offset)


def plain_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def plain_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    rotary = 2 * cos.shape[-1]
    if interleaved:
        cos, sin = (x.repeat_interleave(2, -1).unsqueeze(1).to(q.dtype) for x in (cos, sin))
    else:
        cos, sin = (torch.cat((x, x), -1).unsqueeze(1).to(q.dtype) for x in (cos, sin))

    def turn(x: Tensor) -> Tensor:
        head, rest = x[..., :rotary], x[..., rotary:]
        if interleaved:
            swapped = torch.stack((-head[..., 1::2], head[..., 0::2]), -1).flatten(-2)
        else:
            first, second = head.chunk(2, -1)
            swapped = torch.cat((-second, first), -1)
        return torch.cat((head * cos + swapped * sin, rest), -1)

    return turn(q), turn(k)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(function: Callable[..., Any], leaves: Sequence[Tensor], *constants: Any) -> list[Tensor]:
    """Results, then gradients to `leaves` from fixed random upstream ones."""
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    results = function(*leaves, *constants)
    results = list(results) if isinstance(results, tuple) else [results]
    upstream = [random(i, *r.shape).to(r) for i, r in enumerate(results)]
    return [r.detach() for r in results] + list(torch.autograd.grad(results, leaves, upstream))


def assert_as_good_as_plain(
    ours: Callable[..., Any],
    plain: Callable[..., Any],
    leaves: Sequence[Tensor],
    *constants: Any,
) -> None:
    """Error <= 2x the plain version's, or one rounding of the result, both as a norm."""
    wide_constants = [c.double() if isinstance(c, Tensor) else c for c in constants]
    truth = run(plain, [leaf.double() for leaf in leaves], *wide_constants)
    pairs = zip(run(ours, leaves, *constants), run(plain, leaves, *constants), strict=True)
    for number, ((found, expected), exact) in enumerate(zip(pairs, truth, strict=True)):
        assert found.dtype == expected.dtype
        assert found.shape == expected.shape
        error, bound = (found - exact).norm(), (expected - exact).norm()
        rounding = torch.finfo(expected.dtype).eps * exact.norm()
        assert error <= torch.maximum(2 * bound, rounding), f"{number}: {error} > 2 * {bound}"


NORM_SHAPES = [(1, 7), (7, 63), (2, 3, 64), (63, 257), (5, 1000)]


@dtypes
@devices
@pytest.mark.parametrize("offset", [0.0, 1.0], ids=["llama", "gemma"])
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_rms_norm(shape: tuple[int, ...], offset: float, dtype: torch.dtype, device: str) -> None:
    leaves = [random(0, *shape).to(device, dtype), random(1, shape[-1]).to(device, dtype)]
    assert_as_good_as_plain(ops.rms_norm, plain_rms_norm, leaves, EPS, offset)


@devices
@pytest.mark.parametrize("scale", [1e-15, 1e-3, 1e15], ids=["vanishing", "small", "large"])
def test_rms_norm_of_extreme_rows(scale: float, device: str) -> None:
    leaves = [random(0, 9, 130).to(device) * scale, random(1, 130).to(device)]
    assert_as_good_as_plain(ops.rms_norm, plain_rms_norm, leaves, EPS)


@devices
def test_rms_norm_with_a_frozen_weight(device: str) -> None:
    x, weight = random(0, 7, 63).to(device), random(1, 63).to(device)
    _, d_x, _ = run(ops.rms_norm, [x, weight], EPS)
    _, d_x_alone = run(lambda leaf: ops.rms_norm(leaf, weight, EPS), [x])
    assert torch.equal(d_x, d_x_alone)


SWIGLU_SHAPES = [(1,), (7, 63), (2, 3, 257), (5, 1031)]


@dtypes
@devices
@pytest.mark.parametrize("shape", SWIGLU_SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_swiglu(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    leaves = [random(i, *shape).to(device, dtype) for i in (0, 1)]
    assert_as_good_as_plain(ops.swiglu, plain_swiglu, leaves)


@devices
def test_swiglu_saturates(device: str) -> None:
    gate = torch.tensor([-1e30, -1e4, -100.0, 0.0, 100.0, 1e4, 1e30], device=device)
    out, d_gate, d_up = run(ops.swiglu, [gate, torch.ones_like(gate)])
    upstream = random(0, 7).to(device)
    torch.testing.assert_close(out, gate.clamp_min(0))
    torch.testing.assert_close(d_gate, upstream * torch.tensor([0, 0, 0, 0.5, 1, 1, 1]).to(device))
    torch.testing.assert_close(d_up, upstream * gate.clamp_min(0))


@devices
def test_swiglu_of_the_halves_of_a_projection(device: str) -> None:
    fused = random(0, 7, 5, 2 * 63).to(device)
    gate, up = fused.chunk(2, -1)
    halves, dense = run(ops.swiglu, [gate, up]), run(ops.swiglu, [gate.clone(), up.clone()])
    for found, expected in zip(halves, dense, strict=True):
        torch.testing.assert_close(found, expected)


# query heads, key heads, head dim, rotated dims
ROPE_SHAPES = [(4, 4, 64, 64), (4, 1, 64, 64), (8, 1, 2, 2), (6, 3, 80, 32), (1, 1, 96, 96)]


def rope_inputs(
    heads: tuple[int, int], dim: int, rotary: int, dtype: torch.dtype, device: str, batches: int = 2
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Queries and keys as they lie after a projection, (B, T, H, D), seen as (B, H, T, D)."""
    tokens = 7
    q, k = (random(i, 2, tokens, h, dim).to(device, dtype) for i, h in enumerate(heads))
    angles = random(2, batches, tokens, rotary // 2).to(device) * 3
    return [q.transpose(1, 2), k.transpose(1, 2)], angles.cos(), angles.sin()


@dtypes
@devices
@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
@pytest.mark.parametrize(
    "shape", ROPE_SHAPES, ids=["H{}-K{}-D{}-R{}".format(*s) for s in ROPE_SHAPES]
)
def test_rope(
    shape: tuple[int, int, int, int], interleaved: bool, dtype: torch.dtype, device: str
) -> None:
    leaves, cos, sin = rope_inputs(shape[:2], *shape[2:], dtype, device)
    assert_as_good_as_plain(ops.rope, plain_rope, leaves, cos, sin, interleaved)


@devices
def test_rope_keeps_the_layout_and_shares_positions(device: str) -> None:
    leaves, cos, sin = rope_inputs((4, 2), 64, 64, torch.float32, device, batches=1)
    shared = run(ops.rope, leaves, cos, sin)
    repeated = run(ops.rope, leaves, cos.expand(2, -1, -1), sin.expand(2, -1, -1))
    assert all(
        torch.equal(found, expected) for found, expected in zip(shared, repeated, strict=True)
    )
    assert [r.stride() for r in shared[:2]] == [leaf.stride() for leaf in leaves]


@devices
def test_rope_of_a_scaled_table(device: str) -> None:
    leaves, cos, sin = rope_inputs((4, 2), 64, 64, torch.float32, device)
    assert_as_good_as_plain(ops.rope, plain_rope, leaves, cos * 1.3, sin * 1.3)


@devices
def test_rope_keeps_lengths_and_relative_positions(device: str) -> None:
    """Rotations by 1 and by 5 differ in the product of q and k only by their difference."""
    vector = random(0, 1, 1, 1, 64).to(device).expand(1, 1, 6, 64)
    angles = torch.arange(6.0, device=device)[None, :, None] * random(1, 32).to(device)
    q, k = ops.rope(vector, vector, angles.cos(), angles.sin())
    product = q[0, 0] @ k[0, 0].T
    torch.testing.assert_close(product.diagonal(), product[0, 0].expand(6))
    torch.testing.assert_close(product.diagonal(2), product[0, 2].expand(4), rtol=1e-4, atol=1e-4)


@dtypes
@devices
def test_opcheck(dtype: torch.dtype, device: str) -> None:
    namespace = torch.ops.hybrid_engine
    x, weight, up = (
        random(i, *s).to(device, dtype) for i, s in enumerate([(7, 63), (63,), (7, 63)])
    )
    for leaf in (x, weight, up):
        leaf.requires_grad_()
    torch.library.opcheck(namespace.rms_norm.default, (x, weight, EPS, 1.0))
    torch.library.opcheck(namespace.swiglu.default, (x, up))
    (q, k), cos, sin = rope_inputs((4, 2), 16, 8, dtype, device)
    torch.library.opcheck(
        namespace.rope.default, (q.requires_grad_(), k.requires_grad_(), cos, sin, True)
    )


@devices
def test_empty(device: str) -> None:
    def empty(*shape: int) -> Tensor:
        return torch.empty(*shape, device=device)

    _, d_x, d_weight = run(ops.rms_norm, [empty(0, 63), torch.ones(63, device=device)], EPS)
    assert d_x.shape == (0, 63)
    assert torch.equal(d_weight, torch.zeros_like(d_weight))
    assert [r.shape for r in run(ops.swiglu, [empty(0, 63), empty(0, 63)])] == [(0, 63)] * 3
    shapes = [
        r.shape
        for r in run(
            ops.rope, [empty(2, 4, 0, 8), empty(2, 1, 0, 8)], empty(2, 0, 4), empty(2, 0, 4)
        )
    ]
    assert shapes == [(2, 4, 0, 8), (2, 1, 0, 8)] * 2


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (
            ((2, 4, 3, 8), (2, 2, 5, 8), (2, 3, 4)),
            r"k: expected \[2, any, 3, 8\], got \[2, 2, 5, 8\]",
        ),
        (((2, 4, 3, 8), (2, 2, 3, 8), (2, 5, 4)), r"cos: expected \[2, 3, any\], got \[2, 5, 4\]"),
        (((2, 4, 3, 8), (2, 2, 3, 8), (2, 3, 5)), r"cos: expected \[1 or 2, 3, at most 4\]"),
        (((2, 4, 3, 8), (2, 2, 3, 8), (3, 3, 4)), r"cos: expected \[1 or 2, 3, at most 4\]"),
    ],
)
def test_rope_names_bad_input(shapes: tuple[tuple[int, ...], ...], message: str) -> None:
    q, k, cos = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        ops.rope(q, k, cos, cos)


def test_swiglu_names_bad_input() -> None:
    with pytest.raises(ValueError, match=r"up: expected \[2, 3\], got \[2, 4\]"):
        ops.swiglu(torch.zeros(2, 3), torch.zeros(2, 4))
