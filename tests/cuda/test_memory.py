"""The kernels under sanitizers: no access outside a buffer, no race between threads of a block."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

import pytest

from tests.cuda_emulator.build import CSRC, build_program, why_unavailable

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))

# Each program has families of its own.
PROGRAMS = {
    "memory_check.cu": ("norm", "activation", "rope", "sampling", "gather", "advantage"),
    "memory_check_model.cu": ("attention", "linear"),
}
FAMILIES = [family for families in PROGRAMS.values() for family in families]
# Those whose threads share memory; the products take a minute to watch.
SHARING = (
    "norm", "sampling", "advantage",
    *(pytest.param(family, marks=pytest.mark.slow) for family in ("attention", "linear")),
)  # fmt: skip
FLAGS = {"address": ["-fsanitize=address", "-O1"], "thread": ["-fsanitize=thread"]}
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "atexit_sleep_ms=0"}


@cache
def program(family: str, sanitizer: str) -> Path:
    """The one that has the family, built with it and its like."""
    ((driver, families),) = ((d, f) for d, f in PROGRAMS.items() if family in f)
    sources = [*(CSRC / f"cuda/{name}.cu" for name in families), Path(__file__).with_name(driver)]
    return build_program(sources, FLAGS[sanitizer])


def check(program: Path, *arguments: str) -> None:
    done = subprocess.run(
        [program, *arguments], env={**os.environ, **OPTIONS}, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("family", FAMILIES)
def test_no_access_is_out_of_bounds(family: str) -> None:
    check(program(family, "address"), family)


@pytest.mark.parametrize("family", SHARING)
def test_no_data_race(family: str) -> None:
    check(program(family, "thread"), family, "quick")


@pytest.mark.parametrize("driver", PROGRAMS)
def test_an_unknown_family_lists_the_known(driver: str) -> None:
    families = PROGRAMS[driver]
    done = subprocess.run([program(families[0], "address"), "x"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.split("families:")[1].split() == sorted(families)
