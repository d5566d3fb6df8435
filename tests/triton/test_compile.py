"""Every Triton kernel, as launched, becomes a cubin for Ampere and Hopper that fits and spills not.

Compiled without a GPU, in a process of its own.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SHARED_MEMORY = {80: 166_912, 90: 232_448}  # bytes that one block may have
KERNELS = (
    "rms_norm_fwd_kernel",
    "rms_norm_bwd_kernel",
    "swiglu_fwd_kernel",
    "swiglu_bwd_kernel",
    "rope_fwd_kernel",
    "linear_logprob_fwd_kernel",
    "linear_logprob_merge_kernel",
    "linear_logprob_bwd_logits_kernel",
    "linear_logprob_bwd_hidden_kernel",
)
PRODUCTS = [name for name in KERNELS if name.startswith("linear_logprob") and "merge" not in name]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cache = str(tmp_path_factory.mktemp("triton"))
    environment = {**os.environ, "TRITON_CACHE_DIR": cache, "HYBRID_ENGINE_NATIVE": "off"}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, str(Path(__file__).with_name("compile_kernels.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-8000:]
    return json.loads(done.stdout)


def cases(report: dict[str, Any], kernel: str, architecture: int) -> list[dict[str, Any]]:
    found = [
        record
        for record in report["records"]
        if (record["kernel"], record["architecture"]) == (kernel, architecture)
    ]
    assert found, f"{kernel} was not compiled for sm_{architecture}"
    return found


def test_no_kernel_is_left_out(report: dict[str, Any]) -> None:
    assert sorted(report["kernels"]) == sorted(KERNELS)


@pytest.mark.parametrize("architecture", SHARED_MEMORY, ids="sm_{}".format)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_fits(report: dict[str, Any], kernel: str, architecture: int) -> None:
    for case in cases(report, kernel, architecture):
        assert case["shared"] <= SHARED_MEMORY[architecture], case
        assert case["registers"] * 32 * case["warps"] <= 65_536, case


@pytest.mark.parametrize("architecture", SHARED_MEMORY, ids="sm_{}".format)
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_does_not_spill(report: dict[str, Any], kernel: str, architecture: int) -> None:
    """Except on rows that are no multiple of 16 bytes, which are loaded number by number."""
    for case in cases(report, kernel, architecture):
        assert case["stack"] == 0 or case["case"].endswith("ragged"), case


@pytest.mark.parametrize("architecture", SHARED_MEMORY, ids="sm_{}".format)
@pytest.mark.parametrize("kernel", PRODUCTS)
def test_products_use_tensor_cores(report: dict[str, Any], kernel: str, architecture: int) -> None:
    wanted = "wgmma" if architecture == 90 else "mma"
    for case in cases(report, kernel, architecture):
        assert case["tensor_cores"] == ("none" if case["case"] == "fp32" else wanted), case
