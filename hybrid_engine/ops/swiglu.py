"""SwiGLU with a gradient: the training twin of `silu_and_mul`, on gate and up of their own."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_engine.ops import check
from hybrid_engine.ops.chunks import row_chunks
from hybrid_engine.ops.registry import NAMESPACE, define_op


def _fake(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


def _fake_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


@define_op("swiglu(Tensor gate, Tensor up) -> Tensor", fake=_fake)
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, arXiv 2002.05202, eq. 6. Gradients to both.

    Args:
        gate, up: (..., I), fp32, bf16 or fp16; halves of a fused projection are welcome.

    Returns (..., I), contiguous. Arithmetic in fp32, rounded once.
    """
    check.shape("up", up, gate.shape)
    check.dtype("up", up, gate.dtype)
    out = _fake(gate, up)
    for y, g, u in row_chunks(out, gate, up):
        y.copy_(F.silu(g.float()).mul_(u))
    return out


@define_op("swiglu_backward(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)",
           fake=_fake_backward)  # fmt: skip
def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of `swiglu` to gate and up, (..., I) each:

    d_up = grad * silu(gate), d_gate = grad * up * s * (1 + gate * (1 - s)), s = sigmoid(gate).
    """
    d_gate, d_up = _fake_backward(grad, gate, up)
    for d_g, d_u, d_y, g, u in row_chunks(d_gate, d_up, grad, gate, up):
        wide = g.float()
        d_u.copy_(F.silu(wide).mul_(d_y))
        d_g.copy_(torch.ops.aten.silu_backward(d_y.float() * u, wide))
    return d_gate, d_up


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return swiglu_backward(grad, *ctx.saved_tensors)


torch.library.register_autograd(f"{NAMESPACE}::swiglu", _backward, setup_context=_save)
