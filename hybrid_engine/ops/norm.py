"""RMSNorm and LayerNorm, plain and fused with the residual addition before them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_engine.ops import check
from hybrid_engine.ops.chunks import row_chunks
from hybrid_engine.ops.registry import NAMESPACE, define_op


def _fake_like_first(x: Tensor, *args: object, **kwargs: object) -> Tensor:
    return torch.empty_like(x)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> None:
    check.has_last_dimension("x", x)
    check.first_operand("x", x)
    check.operand("weight", weight, x.shape[-1:], x.dtype, x)
    check.operand("bias", bias, x.shape[-1:], x.dtype, x)
    check.operand("residual", residual, x.shape, x.dtype, x)


@define_op(
    "rms_norm(Tensor x, Tensor weight, float eps, float weight_offset=0.0) -> Tensor",
    fake=_fake_like_first,
)
def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * (weight + weight_offset), over the last dimension.

    Args:
        x: (..., D), fp32, bf16 or fp16.
        weight: (D,), the dtype of x.
        eps: added to the mean square.
        weight_offset: 1.0 for Gemma, whose stored weight is the deviation from one.

    Returns (..., D). Arithmetic in fp32, rounded once. Source: arXiv 1910.07467, eq. 4.
    """
    _check(x, weight)
    return rms_normalise(x, weight, eps, weight_offset)


def rms_normalise(x: Tensor, weight: Tensor, eps: float, weight_offset: float) -> Tensor:
    """The maths of `rms_norm`, whatever the layout and the dtype of the weight."""
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * (weight.float() + weight_offset)).to(x.dtype)


def _fake_rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, weight_offset: float, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape if needs_weight else 0)


@define_op(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor weight, float eps, float weight_offset, "
    "bool needs_weight) -> (Tensor, Tensor)",
    fake=_fake_rms_norm_backward,
)
def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, weight_offset: float, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `rms_norm` to x (..., D) and weight (D,), without elements if not needed.

    With r = 1 / sqrt(mean(x^2) + eps), n = x r and g = grad * (weight + weight_offset):
    d_x = r (g - n mean(g n)), d_weight = sum over rows of grad * n.
    """
    d_x, d_weight = _fake_rms_norm_backward(grad, x, weight, eps, weight_offset, needs_weight)
    gain = weight.float() + weight_offset
    total = torch.zeros_like(gain)
    for d_rows, d_y, rows in row_chunks(d_x, grad, x):
        wide = rows.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        normed = wide.mul(scale)
        product = normed * d_y
        total += product.sum(0)
        projection = (product @ gain).unsqueeze(1).div_(gain.shape[0])  # mean(g n)
        d_rows.copy_((d_y * gain).sub_(normed.mul_(projection)).mul_(scale))
    return d_x, d_weight.copy_(total) if needs_weight else d_weight


def _save_rms_norm(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps, ctx.weight_offset = inputs
    ctx.save_for_backward(x, weight)


def _backward_rms_norm(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs_weight = ctx.needs_input_grad[1]
    d_x, d_weight = rms_norm_backward(grad, x, weight, ctx.eps, ctx.weight_offset, needs_weight)
    return d_x, d_weight if needs_weight else None, None, None


torch.library.register_autograd(
    f"{NAMESPACE}::rms_norm", _backward_rms_norm, setup_context=_save_rms_norm
)


@define_op(
    "add_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float eps, "
    "float weight_offset=0.0) -> Tensor",
    fake=_fake_like_first,
)
def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0
) -> Tensor:
    """residual += x, then rms_norm(residual). Shapes as in `rms_norm`; residual like x."""
    _check(x, weight, residual=residual)
    residual.add_(x)
    return rms_norm.reference(residual, weight, eps, weight_offset)


@define_op(
    "layer_norm(Tensor x, Tensor weight, Tensor? bias, float eps) -> Tensor",
    fake=_fake_like_first,
)
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """y = (x - mean) / sqrt(var + eps) * weight + bias, over the last dimension.

    Args:
        x: (..., D), fp32, bf16 or fp16; weight and bias: (D,), the dtype of x.

    Returns (..., D). Arithmetic in fp32, rounded once. Source: arXiv 1607.06450, eq. 4.
    """
    _check(x, weight, bias)
    wide_bias = None if bias is None else bias.float()
    return F.layer_norm(x.float(), x.shape[-1:], weight.float(), wide_bias, eps).to(x.dtype)


@define_op(
    "add_layer_norm(Tensor x, Tensor(a!) residual, Tensor weight, Tensor? bias, float eps) "
    "-> Tensor",
    fake=_fake_like_first,
)
def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> Tensor:
    """residual += x, then layer_norm(residual). Shapes as in `layer_norm`; residual like x."""
    _check(x, weight, bias, residual)
    residual.add_(x)
    return layer_norm.reference(residual, weight, bias, eps)
