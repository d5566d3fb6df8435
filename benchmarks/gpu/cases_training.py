"""The training ops, forwards and backwards, against what Hugging Face models compute."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.case import (
    BF16,
    EPS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    Case,
    Place,
    joined,
    size,
)
from hybrid_engine import ops

TOKENS, INNER = 16384, 11008  # a micro-batch of a 7B model


def swiglus(at: Place) -> Iterator[Case]:
    gate, up, grad = (at.randn(at.size(TOKENS), at.size(INNER)) for _ in range(3))
    yield Case(
        ops.swiglu, "fwd", ops.swiglu, lambda g, u: F.silu(g) * u, (gate, up), 3 * size(gate), True,
    )  # fmt: skip
    backward = ops.OPS["swiglu_backward"]

    def plain(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.aten.silu_backward(grad * up, gate), grad * F.silu(gate)

    yield Case(
        backward, "bwd", backward, plain, (grad, gate, up), 5 * size(gate), True, result=joined,
    )  # fmt: skip


def norms(at: Place) -> Iterator[Case]:
    x, grad = (at.randn(at.size(TOKENS), at.size(HIDDEN)) for _ in range(2))
    weight = at.randn(at.size(HIDDEN))
    backward = ops.OPS["rms_norm_backward"]

    def plain(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        wide = x if x.dtype == torch.float64 else x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
        normed = wide * scale
        g = grad * weight
        d_x = scale * (g - normed * (g * normed).mean(-1, keepdim=True))
        return d_x.to(x.dtype), (grad * normed).sum(0).to(x.dtype)

    # The weight's gradient adds up thousands of rows: its error is another, and not compared here.
    yield Case(
        backward, "bwd", lambda g, x, w: backward(g, x, w, EPS, 0.0, True), plain,
        (grad, x, weight), 3 * size(x), True, result=lambda out: out[0],
    )  # fmt: skip


def ropes(at: Place) -> Iterator[Case]:
    batch, tokens = 8, at.size(2048)
    q, k = (at.randn(batch, heads, tokens, HEAD_DIM) for heads in (HEADS, KV_HEADS))
    angles = torch.rand(1, tokens, HEAD_DIM // 2, device=at.device) * 6

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    def plain(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        wide = (torch.cat((x, x), -1).unsqueeze(1).to(q.dtype) for x in (cos, sin))
        cos, sin = wide
        return turned(q, cos, sin), turned(k, cos, sin)

    args = (q, k, angles.cos().to(BF16), angles.sin().to(BF16))
    yield Case(ops.rope, "fwd", ops.rope, plain, args, 2 * size(q, k), True, result=joined)


FAMILIES = (swiglus, norms, ropes)
