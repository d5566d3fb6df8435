"""RMSNorm on a GPU: forward reads x and writes y once; backward reads x and dy and writes dx once.

A program holds whole rows in registers, several where they are short. In the backward pass each
program walks a run of rows and keeps the weight's gradient of its run; a sum over programs follows.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hybrid_engine.ops import check
from hybrid_engine.ops import norm as plain
from hybrid_engine.ops.triton.rows import as_rows, multiprocessors

MAX_DIM = 8192  # the longest row that backward keeps in registers without spilling


@triton.jit
def rms_norm_fwd_kernel(
    y_ptr,  # [N, D]
    x_ptr,  # [N, D]
    weight_ptr,  # [D]
    rows,
    dim,
    stride_x_row,
    eps,
    weight_offset,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = tl.arange(0, BLOCK_D)[None, :]
    mask = (row < rows) & (column < dim)
    x = tl.load(x_ptr + row * stride_x_row + column, mask=mask, other=0.0).to(tl.float32)
    gain = tl.load(weight_ptr + column, mask=column < dim, other=0.0).to(tl.float32) + weight_offset
    scale = tl.rsqrt(tl.sum(x * x, 1) / dim + eps)[:, None]
    tl.store(y_ptr + row * dim + column, (x * scale * gain).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def rms_norm_bwd_kernel(
    d_x_ptr,  # [N, D]
    d_weight_ptr,  # [programs, D] fp32
    d_y_ptr,  # [N, D]
    x_ptr,  # [N, D]
    weight_ptr,  # [D]
    rows,
    dim,
    rows_per_program,
    stride_d_y_row,
    stride_x_row,
    eps,
    weight_offset,
    NEEDS_WEIGHT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pid = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK_D)[None, :]
    gain = tl.load(weight_ptr + column, mask=column < dim, other=0.0).to(tl.float32) + weight_offset
    d_weight = tl.zeros((BLOCK_ROWS, BLOCK_D), tl.float32)
    first = pid * rows_per_program
    for start in range(first, tl.minimum(first + rows_per_program, rows), BLOCK_ROWS):
        row = start + tl.arange(0, BLOCK_ROWS)[:, None]
        mask = (row < rows) & (column < dim)
        x = tl.load(x_ptr + row * stride_x_row + column, mask=mask, other=0.0).to(tl.float32)
        d_y = tl.load(d_y_ptr + row * stride_d_y_row + column, mask=mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(x * x, 1) / dim + eps)[:, None]
        normed = x * scale
        g = d_y * gain
        d_x = scale * (g - normed * (tl.sum(g * normed, 1) / dim)[:, None])
        tl.store(d_x_ptr + row * dim + column, d_x.to(d_x_ptr.dtype.element_ty), mask=mask)
        if NEEDS_WEIGHT:
            d_weight += d_y * normed
    if NEEDS_WEIGHT:
        total = tl.sum(d_weight, 0)[None, :]
        tl.store(d_weight_ptr + pid * dim + column, total, mask=column < dim)


def launch_shape(dim: int) -> tuple[int, int, int]:
    """BLOCK_ROWS, BLOCK_D and warps: 4096 numbers a program at least, 16 a thread."""
    block = triton.next_power_of_2(dim)
    block_rows = max(1, 4096 // block)
    return block_rows, block, min(16, block_rows * block // 512)


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_offset: float = 0.0) -> Tensor:
    check.first_operand("x", x)
    check.operand("weight", weight, x.shape[-1:], x.dtype, x)
    if x.shape[-1] > MAX_DIM:
        return plain.rms_norm.reference(x, weight, eps, weight_offset)
    rows, y = as_rows(x), x.new_empty(x.shape)
    if not x.numel():
        return y
    block_rows, block_d, warps = launch_shape(x.shape[-1])
    grid = (triton.cdiv(rows.shape[0], block_rows),)
    rms_norm_fwd_kernel[grid](
        y,
        rows,
        weight,
        *rows.shape,
        rows.stride(0),
        eps,
        weight_offset,
        BLOCK_ROWS=block_rows,
        BLOCK_D=block_d,
        num_warps=warps,
    )
    return y


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, eps: float, weight_offset: float, needs_weight: bool
) -> tuple[Tensor, Tensor]:
    dim = x.shape[-1]
    if dim > MAX_DIM or not x.numel():
        return plain.rms_norm_backward.reference(grad, x, weight, eps, weight_offset, needs_weight)
    rows, d_y, d_x = as_rows(x), as_rows(grad), x.new_empty(x.shape)
    block_rows, block_d, warps = launch_shape(dim)
    blocks = triton.cdiv(rows.shape[0], block_rows)
    blocks_per_program = triton.cdiv(blocks, 4 * multiprocessors(x))
    programs = triton.cdiv(blocks, blocks_per_program)
    partial = x.new_empty(programs if needs_weight else 0, dim, dtype=torch.float32)
    rms_norm_bwd_kernel[(programs,)](
        d_x,
        partial,
        d_y,
        rows,
        weight,
        *rows.shape,
        blocks_per_program * block_rows,
        d_y.stride(0),
        rows.stride(0),
        eps,
        weight_offset,
        NEEDS_WEIGHT=needs_weight,
        BLOCK_ROWS=block_rows,
        BLOCK_D=block_d,
        num_warps=warps,
    )
    if not needs_weight:
        return d_x, weight.new_empty(0)
    return d_x, partial.sum(0).to(weight.dtype)
