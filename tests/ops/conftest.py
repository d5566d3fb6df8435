"""What the tests of every op family share: implementations, the error bound, the paged cache."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_engine import ops
from tests.ops.on_device import OnDevice

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ILLEGAL_BLOCK = 2**30  # following it leaves the address space of any cache


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "isa: compact case, repeated for each instruction set")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marks = metafunc.definition.iter_markers("parametrize")
    if "dtype" in metafunc.fixturenames and not any(mark.args[0] == "dtype" for mark in marks):
        metafunc.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


@dataclass(frozen=True)
class Implementation:
    """One way to run an op on the CPU: its native kernel, or the naive reference."""

    name: str

    def __call__(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        if self.name == "reference":
            return op.reference(*args, **kwargs)
        if op.implementation("cpu") != "native":
            pytest.skip(f"no native {op.name} on the CPU: {ops.NATIVE.reason}")
        return op(*args, **kwargs)


@pytest.fixture(
    params=["native", "reference"]
    + [pytest.param("cuda", marks=pytest.mark.gpu)] * torch.cuda.is_available()
)
def run(request: pytest.FixtureRequest) -> Implementation | OnDevice:
    """`run(op, *args)` for each implementation of the op."""
    if request.param == "native" and ops.NATIVE.library is None:
        pytest.skip(f"native only: {ops.NATIVE.reason}")
    return OnDevice() if request.param == "cuda" else Implementation(request.param)


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _widen(x: Any) -> Any:
    if isinstance(x, list):
        return [_widen(item) for item in x]
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _assert_accurate(actual: Tensor, plain: Callable[..., Tensor], *inputs: Any) -> None:
    truth = plain(*map(_widen, inputs)).double()
    baseline = plain(*inputs)
    assert actual.dtype == baseline.dtype
    assert actual.shape == truth.shape
    if truth.numel() == 0:
        return
    finite = truth.to(actual.dtype).isfinite()
    torch.testing.assert_close(
        actual[~finite], truth.to(actual.dtype)[~finite], rtol=0, atol=0, equal_nan=True
    )
    if not finite.any():
        return
    truth = truth[finite]
    error = (actual.double()[finite] - truth).abs().amax().item()
    allowed = 2 * (baseline.double()[finite] - truth).abs().nan_to_num(0.0).amax().item()
    rounding = torch.finfo(actual.dtype).eps * truth.abs().amax().item()
    assert error <= max(allowed, rounding), f"error {error:.3g}, allowed {allowed:.3g}"


@pytest.fixture
def assert_accurate() -> Callable[..., None]:
    """`assert_accurate(actual, plain, *inputs)`: at most twice the error of plain PyTorch.

    `plain(*inputs)` is the PyTorch expression of the op; on the inputs widened to fp64 it is the
    truth, on the inputs as they are it is the baseline. A baseline that is right by luck, as on
    one element, is credited with one rounding of the largest result.
    """
    return _assert_accurate


@dataclass(frozen=True)
class PagedCache:
    """Dense keys and values, scattered over shuffled blocks of a cache that is NaN elsewhere."""

    keys: list[Tensor]  # per sequence (S, K, D)
    values: list[Tensor]
    k_cache: Tensor  # (num_blocks, K, block_size, D)
    v_cache: Tensor
    block_tables: Tensor  # (B, max_blocks) int32, unused entries illegal
    seq_lens: Tensor  # (B,) int32


@pytest.fixture
def paged_cache(rng: torch.Generator) -> Callable[..., PagedCache]:
    def make(
        lengths: list[int], kv_heads: int, head_dim: int, dtype: torch.dtype, block_size: int = 16
    ) -> PagedCache:
        counts = [-(-length // block_size) for length in lengths]
        num_blocks = sum(counts) + 3
        order = torch.randperm(num_blocks, generator=rng).int()
        shape = (num_blocks, kv_heads, block_size, head_dim)
        k_cache, v_cache = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
        tables = torch.full((len(lengths), max([0, *counts]) + 2), ILLEGAL_BLOCK, dtype=torch.int32)
        keys, values = [], []
        for i, length in enumerate(lengths):
            blocks, order = order[: counts[i]], order[counts[i] :]
            tables[i, : counts[i]] = blocks
            for dense, cache in ((keys, k_cache), (values, v_cache)):
                rows = torch.randn(length, kv_heads, head_dim, generator=rng).to(dtype)
                dense.append(rows)
                for j in range(length):
                    cache[blocks[j // block_size], :, j % block_size] = rows[j]
        seq_lens = torch.tensor(lengths, dtype=torch.int32)
        return PagedCache(keys, values, k_cache, v_cache, tables, seq_lens)

    return make


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a snippet in a fresh interpreter with the given environment on top of this one."""
    import os

    def run(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, **env}
        return subprocess.run(
            [sys.executable, *args], env=environment, capture_output=True, text=True, timeout=300
        )

    return run
