"""What the launchers share: tensors as rows, and launch shapes."""

from __future__ import annotations

import torch
from torch import Tensor


def as_rows(x: Tensor) -> Tensor:
    """(..., D) as (N, D) with neighbouring columns side by side; copied only if strides demand."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def multiprocessors(x: Tensor) -> int:
    """Of the device of x; 2 for the interpreter, so that small shapes also span programs."""
    if x.device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(x.device).multi_processor_count
