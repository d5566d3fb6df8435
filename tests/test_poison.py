"""Uninitialised memory is visible in every test: see `poisoned_empty` in conftest.py."""

from __future__ import annotations

import pytest
import torch


@pytest.mark.parametrize(
    "make",
    [
        lambda dtype: torch.empty(1000, dtype=dtype),
        lambda dtype: torch.empty_like(torch.zeros(1000, dtype=dtype)),
        lambda dtype: torch.zeros(1).new_empty(1000, dtype=dtype),
        lambda dtype: torch.empty_strided((10, 100), (100, 1), dtype=dtype),
        lambda dtype: torch.zeros(1, dtype=dtype).resize_(1000)[1:],
    ],
    ids=["empty", "empty_like", "new_empty", "empty_strided", "resize"],
)
def test_uninitialised_memory_is_poisoned(make):
    assert make(torch.float32).isnan().all()
    assert make(torch.bfloat16).isnan().all()
    assert (make(torch.int64) == torch.iinfo(torch.int64).max).all()
