"""SwiGLU on a GPU: one pass over gate and up forward, one over them and the gradient backward.

One flat grid of tiles; contiguous tensors are one long row, so a short last dimension wastes none.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hybrid_engine.ops import check
from hybrid_engine.ops.triton.rows import as_rows

BLOCK = 2048  # 16 bf16 numbers a thread at 4 warps: two 16-byte loads


@triton.jit
def _tile(dim, BLOCK: tl.constexpr):
    """Row and columns of this program's tile."""
    tiles = tl.cdiv(dim, BLOCK)
    pid = tl.program_id(0).to(tl.int64)
    return pid // tiles, (pid % tiles) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def swiglu_fwd_kernel(
    y_ptr,  # [N, I]
    gate_ptr,  # [N, I]
    up_ptr,  # [N, I]
    dim,
    stride_gate_row,
    stride_up_row,
    BLOCK: tl.constexpr,
):
    row, column = _tile(dim, BLOCK)
    mask = column < dim
    gate = tl.load(gate_ptr + row * stride_gate_row + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up_row + column, mask=mask, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * up
    tl.store(y_ptr + row * dim + column, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def swiglu_bwd_kernel(
    d_gate_ptr,  # [N, I]
    d_up_ptr,  # [N, I]
    d_y_ptr,  # [N, I]
    gate_ptr,  # [N, I]
    up_ptr,  # [N, I]
    dim,
    stride_d_y_row,
    stride_gate_row,
    stride_up_row,
    BLOCK: tl.constexpr,
):
    row, column = _tile(dim, BLOCK)
    mask = column < dim
    d_y = tl.load(d_y_ptr + row * stride_d_y_row + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * stride_gate_row + column, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * stride_up_row + column, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    d_gate = d_y * up * s * (1.0 + gate * (1.0 - s))
    d_up = d_y * gate * s
    out = row * dim + column
    tl.store(d_gate_ptr + out, d_gate.to(d_gate_ptr.dtype.element_ty), mask=mask)
    tl.store(d_up_ptr + out, d_up.to(d_up_ptr.dtype.element_ty), mask=mask)


def _rows(*tensors: Tensor) -> list[Tensor]:
    if all(x.is_contiguous() for x in tensors):
        return [x.view(1, -1) for x in tensors]
    return [as_rows(x) for x in tensors]


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    check.shape("up", up, gate.shape)
    check.dtype("up", up, gate.dtype)
    y = gate.new_empty(gate.shape)
    if not gate.numel():
        return y
    g, u = _rows(gate, up)
    grid = (g.shape[0] * triton.cdiv(g.shape[1], BLOCK),)
    swiglu_fwd_kernel[grid](y, g, u, g.shape[1], g.stride(0), u.stride(0), BLOCK=BLOCK)
    return y


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    if not gate.numel():
        return d_gate, d_up
    d_y, g, u = _rows(grad, gate, up)
    grid = (g.shape[0] * triton.cdiv(g.shape[1], BLOCK),)
    swiglu_bwd_kernel[grid](
        d_gate, d_up, d_y, g, u, g.shape[1], d_y.stride(0), g.stride(0), u.stride(0), BLOCK=BLOCK
    )
    return d_gate, d_up
