"""Where the cache lies in memory, by its addresses and by the kernel's own account."""

from __future__ import annotations

import mmap
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hybrid_engine.cache.pages import empty_pages

CPU = torch.device("cpu")


def flags_at(address: int) -> set[str]:
    """VmFlags of the mapping that holds `address`."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return set(line.split()[1:])
    raise AssertionError(f"no mapping at {address:#x}")


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    tensor = empty_pages(shape, dtype=dtype, device=CPU)
    assert tensor.shape == shape
    assert tensor.dtype == dtype
    assert tensor.is_contiguous()
    tensor.fill_(1)  # all of it is there
    return tensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 16, 17, 300])
def test_it_begins_at_a_page(rows: int, dtype: torch.dtype) -> None:
    tensor = empty(rows, 16, 128, dtype=dtype)
    if tensor.nbytes >= mmap.PAGESIZE:
        assert tensor.data_ptr() % mmap.PAGESIZE == 0


@pytest.mark.skipif(sys.platform != "linux", reason="madvise is Linux's")
def test_a_large_one_asks_for_huge_pages() -> None:
    tensor = empty(9 << 20, dtype=torch.bfloat16)
    assert tensor.data_ptr() % (2 << 20) == 0
    assert "hg" in flags_at(tensor.data_ptr())
    assert "hg" in flags_at(tensor.data_ptr() + tensor.nbytes - mmap.PAGESIZE)
