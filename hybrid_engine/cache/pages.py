"""Memory for a cache that is read in pieces: it begins at a page, and at a large one if it can."""

from __future__ import annotations

import ctypes
import math
import mmap
import sys

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20  # bytes, on x86-64 and most others


def empty_pages(shape: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.empty`, on a CPU beginning at a page, so that pieces of whole pages cross none.

    Tensors of a huge page and more begin at one, and Linux is asked to back them by huge pages
    (a hint: where it cannot, nothing changes).
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < mmap.PAGESIZE:
        return torch.empty(shape, dtype=dtype, device=device)
    page = _HUGE_PAGE if size >= _HUGE_PAGE else mmap.PAGESIZE
    storage = torch.empty((size + page) // dtype.itemsize, dtype=dtype)
    skipped = -storage.data_ptr() % page
    start = skipped // dtype.itemsize
    if page == _HUGE_PAGE:
        _advise_huge_pages(storage.data_ptr() + skipped, size)
    return storage[start : start + math.prod(shape)].view(shape)


def _advise_huge_pages(address: int, size: int) -> None:
    """Before the memory is first written: pages that exist stay as they are."""
    if sys.platform == "linux":
        length = ctypes.c_size_t(size // mmap.PAGESIZE * mmap.PAGESIZE)
        ctypes.CDLL(None).madvise(ctypes.c_void_p(address), length, mmap.MADV_HUGEPAGE)
