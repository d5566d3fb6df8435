"""The activations between the two matrix products of an MLP, fused with what surrounds them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_engine.ops import check
from hybrid_engine.ops.registry import define_op


def _fake_gated(x: Tensor, *args: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


def _fake_same(x: Tensor, *args: object) -> Tensor:
    return torch.empty_like(x)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    check.has_last_dimension("x", x)
    check.first_operand("x", x)
    if x.shape[-1] % 2:
        raise ValueError(f"x: expected an even last dimension (gate and up), got {list(x.shape)}")
    gate, up = x.float().chunk(2, dim=-1)
    return gate, up


@define_op("silu_and_mul(Tensor x) -> Tensor", fake=_fake_gated)
def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) * up with [gate, up] = x, the SwiGLU of arXiv 2002.05202, eq. 6.

    Args:
        x: (..., 2 * I), fp32, bf16 or fp16: the output of the fused gate-up projection.

    Returns (..., I). Arithmetic in fp32, rounded once.
    """
    gate, up = _halves(x)
    return (F.silu(gate) * up).to(x.dtype)


@define_op("gelu_and_mul(Tensor x, bool tanh=False) -> Tensor", fake=_fake_gated)
def gelu_and_mul(x: Tensor, tanh: bool = False) -> Tensor:
    """gelu(gate) * up, the GEGLU of arXiv 2002.05202; `tanh` selects the approximation (Gemma).

    Shapes and dtypes as in `silu_and_mul`.
    """
    gate, up = _halves(x)
    return (F.gelu(gate, approximate="tanh" if tanh else "none") * up).to(x.dtype)


@define_op("bias_gelu(Tensor x, Tensor? bias, bool tanh=False) -> Tensor", fake=_fake_same)
def bias_gelu(x: Tensor, bias: Tensor | None, tanh: bool = False) -> Tensor:
    """gelu(x + bias), arXiv 1606.08415.

    Args:
        x: (..., I), fp32, bf16 or fp16; bias: (I,) of the same dtype, or None.
    """
    check.has_last_dimension("x", x)
    check.first_operand("x", x)
    check.operand("bias", bias, x.shape[-1:], x.dtype, x)
    wide = x.float() if bias is None else x.float() + bias.float()
    return F.gelu(wide, approximate="tanh" if tanh else "none").to(x.dtype)


@define_op("relu(Tensor x) -> Tensor", fake=_fake_same)
def relu(x: Tensor) -> Tensor:
    """max(x, 0), any shape, fp32, bf16 or fp16; NaN stays NaN."""
    check.first_operand("x", x)
    return F.relu(x)
