"""What the forward and backward kernels of linear_logprob share: one tile of logits, on chip."""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

GROUP = tl.constexpr(16)  # blocks of rows that run side by side and share what they read


def tile_shape(dtype: torch.dtype) -> dict[str, Any]:
    """Blocks, warps and stages of the products; 96 KiB of shared memory in half precision."""
    if dtype == torch.float32:
        exact = torch.get_float32_matmul_precision() == "highest"
        shape = {"BLOCK_N": 64, "BLOCK_V": 64, "BLOCK_D": 32, "num_warps": 8, "num_stages": 2}
        return {**shape, "PRECISION": "ieee" if exact else "tf32"}
    shape = {"BLOCK_N": 128, "BLOCK_V": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3}
    return {**shape, "PRECISION": "ieee"}


@triton.jit
def grouped(pid, blocks, columns):
    """Program id -> row block and column; a group of row blocks takes all columns, then the next.

    What runs at one time then reads few rows and few columns, and both stay in the L2.
    """
    first = pid // (GROUP * columns) * GROUP
    size = tl.minimum(blocks - first, GROUP)
    within = pid % (GROUP * columns)
    return first + within % size, within // size


@triton.jit
def finite(x):
    """-inf * exp(-inf) is NaN; from -1000 down exp is 0 already."""
    return tl.maximum(x, -1000.0)


@triton.jit
def _tanh(x):
    """The exponential form cancels near 0; there, the polynomial of Cephes' tanhf."""
    z = x * x
    tail = ((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z
    near = x + x * z * ((tail + 1.33314422036e-1) * z - 3.33332819422e-1)
    far = 1.0 - 2.0 / (tl.exp(2.0 * tl.abs(x)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def logits_of(
    hidden_ptr,
    weight_ptr,
    bias_ptr,
    row,  # [BLOCK_N] int64
    first,  # int64, the tile's first column
    rows,
    vocabulary,
    dim,
    stride_hidden_row,
    stride_weight_row,
    temperature,
    softcap,
    HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Logits [BLOCK_N, BLOCK_V], -inf past the vocabulary, and their slope (1 without a cap)."""
    column = tl.arange(0, BLOCK_V)
    inside = first + column < vocabulary
    logits = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    hidden_at = hidden_ptr + row[:, None] * stride_hidden_row
    weight_at = weight_ptr + (first + column)[None, :] * stride_weight_row
    for start in range(0, dim, BLOCK_D):
        k = start + tl.arange(0, BLOCK_D)
        hidden_mask = (row < rows)[:, None] & (k < dim)[None, :]
        hidden = tl.load(hidden_at + k[None, :], mask=hidden_mask, other=0.0)
        weight_mask = (k < dim)[:, None] & inside[None, :]
        weight = tl.load(weight_at + k[:, None], mask=weight_mask, other=0.0).to(hidden.dtype)
        logits = tl.dot(hidden, weight, logits, input_precision=PRECISION)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + first + column, mask=inside, other=0.0)
        logits += bias.to(tl.float32)[None, :]
    slope = 1.0 / temperature
    if HAS_CAP:
        bent = _tanh(logits / softcap)
        logits = bent * softcap
        slope *= 1.0 - bent * bent
    return tl.where(inside[None, :], logits / temperature, float("-inf")), slope


@triton.jit
def is_target(target, first, BLOCK_V: tl.constexpr):
    """[BLOCK_N, BLOCK_V]: where a tile that starts at `first` holds the targets."""
    return tl.arange(0, BLOCK_V)[None, :] == (target - first).to(tl.int32)[:, None]
