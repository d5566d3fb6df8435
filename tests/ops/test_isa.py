"""The libraries for lesser instruction sets, in processes that torch limits to those."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from hybrid_engine import ops
from hybrid_engine.ops.build import INSTRUCTION_SETS

# The libraries under torch choose for themselves: the baseline is that of such a machine.
LIMITS = {
    "avx2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "default": {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}

CAPABILITY = os.environ.get("ATEN_CPU_CAPABILITY")


@pytest.mark.isa
def test_the_library_matches_the_capability():
    if ops.NATIVE.library is None:
        pytest.skip(f"native only: {ops.NATIVE.reason}")
    assert ops.NATIVE.isa in INSTRUCTION_SETS
    assert CAPABILITY is None or ops.NATIVE.isa == CAPABILITY
    assert f"cpu_{ops.NATIVE.isa}" in str(ops.NATIVE.library)


@pytest.mark.parametrize("isa", LIMITS)
def test_other_instruction_sets_agree_with_the_reference(run_python, isa):
    if ops.NATIVE.library is None:
        pytest.skip(f"native only: {ops.NATIVE.reason}")
    if ops.NATIVE.isa == isa:
        pytest.skip(f"this process runs {isa} already")
    folder = str(Path(__file__).parent)
    options = ["-m", "isa", "-k", "not reference", "-q", "-p", "no:cacheprovider"]
    result = run_python("-m", "pytest", folder, *options, ATEN_CPU_CAPABILITY=isa, **LIMITS[isa])
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]
    assert " passed" in result.stdout
    assert " failed" not in result.stdout
