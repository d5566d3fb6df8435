"""The kernels under sanitizers: no access outside a buffer, no race between threads of a block."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.cuda_emulator.build import CSRC, build_program, why_unavailable

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))

FAMILIES = (
    "norm", "activation", "rope", "attention", "linear", "sampling", "gather", "advantage",
)  # fmt: skip
# Those whose threads share memory; the products are slow to watch.
SHARING = (
    "norm", "sampling", "advantage",
    *(pytest.param(family, marks=pytest.mark.slow) for family in ("attention", "linear")),
)  # fmt: skip
DRIVERS = [Path(__file__).with_name(f"memory_check{part}.cu") for part in ("", "_model")]
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "atexit_sleep_ms=0"}


SOURCES = [*(CSRC / f"cuda/{family}.cu" for family in FAMILIES), *DRIVERS]


def check(program: Path, *arguments: str) -> None:
    done = subprocess.run(
        [program, *arguments], env={**os.environ, **OPTIONS}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.fixture(scope="session")
def address_sanitized() -> Path:
    return build_program(SOURCES, ["-fsanitize=address", "-O1"])


@pytest.fixture(scope="session")
def thread_sanitized() -> Path:
    return build_program(SOURCES, ["-fsanitize=thread"])


@pytest.mark.parametrize("family", FAMILIES)
def test_no_access_is_out_of_bounds(address_sanitized: Path, family: str) -> None:
    check(address_sanitized, family)


@pytest.mark.parametrize("family", SHARING)
def test_no_data_race(thread_sanitized: Path, family: str) -> None:
    check(thread_sanitized, family, "quick")
