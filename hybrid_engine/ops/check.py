"""Argument checks of the references. The native bindings make the same ones in C++."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def shape(name: str, tensor: Tensor, expected: Sequence[int]) -> None:
    """Raise ValueError unless `tensor` has the expected shape; -1 matches any size."""
    found = list(tensor.shape)
    wrong_rank = len(found) != len(expected)
    if wrong_rank or any(e not in (-1, f) for e, f in zip(expected, found, strict=True)):
        wanted = ["any" if e == -1 else e for e in expected]
        raise ValueError(f"{name}: expected {wanted}, got {found}".replace("'", ""))


def floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise ValueError(f"{name}: expected a floating dtype, got {tensor.dtype}")
