"""Tensors that no vector instruction may touch whole."""

from __future__ import annotations

import torch
from torch import Tensor


def misaligned(x: Tensor) -> Tensor:
    """A contiguous copy one element behind a 16-byte boundary."""
    storage = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)
    return storage[1:].view(x.shape).copy_(x)
