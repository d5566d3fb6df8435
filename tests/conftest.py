"""Settings of every test, made before torch and hybrid_engine are imported."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("HYBRID_ENGINE_NATIVE", "require")
os.environ.setdefault("HYBRID_ENGINE_CHECK", "1")  # results of kernels are poisoned too
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads starve the neighbours

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned_empty() -> Iterator[None]:
    """`torch.empty` and its kin hold NaN, or the largest integer: what is not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(before, warn_only=warn_only)
