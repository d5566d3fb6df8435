"""Argument checks of the references. The native bindings make the same ones in C++."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def shape(name: str, tensor: Tensor, expected: Sequence[int]) -> None:
    """Raise ValueError unless `tensor` has the expected shape; -1 matches any size."""
    found = list(tensor.shape)
    wrong_rank = len(found) != len(expected)
    if wrong_rank or any(e not in (-1, f) for e, f in zip(expected, found, strict=True)):
        wanted = ["any" if e == -1 else e for e in expected]
        raise ValueError(f"{name}: expected {wanted}, got {found}".replace("'", ""))


def dtype(name: str, tensor: Tensor, expected: torch.dtype) -> None:
    if tensor.dtype != expected:
        raise ValueError(f"{name}: expected {_name(expected)}, got {_name(tensor.dtype)}")


def contiguous(name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: expected a contiguous tensor")


def floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: expected a floating dtype, got {tensor.dtype}")


def first_operand(name: str, tensor: Tensor) -> None:
    """What kernels want of the operand that the others are like: their dtypes, contiguous."""
    if tensor.dtype not in _KERNEL_DTYPES:
        found = _name(tensor.dtype)
        raise ValueError(f"{name}: expected float32, bfloat16 or float16, got {found}")
    contiguous(name, tensor)


def has_last_dimension(name: str, tensor: Tensor) -> None:
    if tensor.dim() == 0:
        raise ValueError(f"{name}: expected at least one dimension, got a scalar")


def operand(
    name: str,
    tensor: Tensor | None,
    expected_shape: Sequence[int],
    expected_dtype: torch.dtype,
    first: Tensor,
) -> None:
    """The usual contract: shape, dtype, the device of the op's first operand, contiguous."""
    if tensor is None:
        return
    shape(name, tensor, expected_shape)
    dtype(name, tensor, expected_dtype)
    if tensor.device != first.device:
        raise ValueError(f"{name}: expected device {first.device}, got {tensor.device}")
    contiguous(name, tensor)


def indices(name: str, values: Tensor, bound: int) -> None:
    """Raise ValueError unless all values are in [0, bound)."""
    outside = (values < 0) | (values >= bound)
    if outside.any():
        place = outside.nonzero()[0].tolist()
        value = values[tuple(place)].item()
        raise ValueError(f"{name}: expected indices in [0, {bound}), got {value} at {place}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
