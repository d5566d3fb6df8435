"""The CUDA emulator notices planted mistakes, and nothing in the same kernels without them."""

from __future__ import annotations

import ctypes
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cuda_emulator.build import (
    ASYNC_POLICIES,
    EMULATOR,
    ORDERS,
    Schedule,
    build_emulated,
    build_program,
    scheduled,
    why_unavailable,
)

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))

PLANTED = [
    EMULATOR / name
    for name in ("planted_bugs.cu", "planted_pipeline_bugs.cu", "planted_bugs_driver.cu")
]
EVERY_SCHEDULE = [Schedule(order, policy, seed=1) for order in ORDERS for policy in ASYNC_POLICIES]


@pytest.fixture(scope="session")
def library_path() -> Path:
    return build_emulated(PLANTED)


@pytest.fixture(scope="session")
def library(library_path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(library_path))


@dataclass(frozen=True)
class Bug:
    message: str  # part of what is said when it is noticed
    orders: tuple[str, ...] = ORDERS  # those that notice it
    policies: tuple[str, ...] = ASYNC_POLICIES

    def is_noticed_by(self, schedule: Schedule) -> bool:
        return schedule.order in self.orders and schedule.async_policy in self.policies


BUGS = {
    "missing_barrier_before_read": Bug("wrong answer"),
    # Only a warp that runs far ahead overwrites what the others have yet to read.
    "missing_barrier_before_reuse": Bug("wrong answer", orders=("greedy",)),
    "missing_syncwarp": Bug("nan,"),
    "divergent_barrier": Bug("divergent barrier: thread 0 at __syncthreads (planted_bugs.cu:"),
    "divergent_shuffle": Bug("thread 0 at __shfl_xor_sync mask 0xffffffff (planted_bugs.cu:"),
    "wrong_mask": Bug("the caller is not in its mask"),
    "shuffle_from_outside_the_mask": Bug("reads lane 20, which is not in the mask"),
    "uninitialised_dynamic_shared": Bug("nan,"),
    "uninitialised_static_shared": Bug("nan,"),
    "dynamic_shared_overrun": Bug("wrote byte 128 of 128 bytes of dynamic shared memory"),
    "static_shared_overrun": Bug("array index 32 is out of bounds (planted_bugs.cu:"),
    "misaligned_load": Bug("is not 16-byte aligned (common.cuh:"),
    "too_many_threads": Bug("invalid block (1025, 1, 1)"),
    "too_much_shared_memory": Bug("233472 bytes of dynamic shared memory"),
    "dependence_between_blocks": Bug("wrong answer", orders=("reverse", "random", "greedy")),
    "missing_async_wait": Bug("nan,", policies=("late",)),
    "missing_pipeline_barrier": Bug("wrong answer", orders=("greedy",), policies=("eager",)),
}

every_bug = pytest.mark.parametrize("name", BUGS)


def noticed(library: ctypes.CDLL, path: Path, name: str, broken: bool, schedule: Schedule) -> str:
    message = ctypes.create_string_buffer(512)
    with scheduled(path, schedule):
        library.planted_bug(name.encode(), int(broken), message, len(message))
    return message.value.decode()


@every_bug
def test_planted_bug_is_noticed(library: ctypes.CDLL, library_path: Path, name: str) -> None:
    bug = BUGS[name]
    for schedule in filter(bug.is_noticed_by, EVERY_SCHEDULE):
        message = noticed(library, library_path, name, True, schedule)
        assert bug.message in message, f"under {schedule}"


@every_bug
def test_clean_twin_passes(library: ctypes.CDLL, library_path: Path, name: str) -> None:
    for schedule in EVERY_SCHEDULE:
        assert noticed(library, library_path, name, False, schedule) == "", f"under {schedule}"


# ---- sanitizers ----------------------------------------------------------------------------------


def run_sanitized(program: Path, name: str, broken: bool) -> subprocess.CompletedProcess[str]:
    """In forward order with eager copies, where no missing barrier shows in the answer."""
    options = {
        "ASAN_OPTIONS": "detect_leaks=0",  # a launch that fails abandons its stacks
        "TSAN_OPTIONS": "atexit_sleep_ms=0",
    }
    arguments = [name, str(int(broken)), str(ORDERS.index("forward")), "1"]
    return subprocess.run(
        [str(program), *arguments],
        env={**os.environ, **options},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture(scope="session")
def address_sanitized() -> Path:
    return build_program([*PLANTED, EMULATOR / "sanitizer_main.cu"], ["-fsanitize=address", "-O1"])


@pytest.fixture(scope="session")
def thread_sanitized() -> Path:
    return build_program([*PLANTED, EMULATOR / "sanitizer_main.cu"], ["-fsanitize=thread"])


def test_address_sanitizer_finds_a_write_out_of_bounds(address_sanitized: Path) -> None:
    report = run_sanitized(address_sanitized, "out_of_bounds_write", broken=True).stderr
    assert "heap-buffer-overflow" in report
    assert "fill_kernel" in report


@pytest.mark.parametrize("name", ["out_of_bounds_write", "missing_pipeline_barrier"])
def test_address_sanitizer_passes_clean_kernels(address_sanitized: Path, name: str) -> None:
    done = run_sanitized(address_sanitized, name, broken=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "right\n", "")


RACES = ["missing_barrier_before_reuse", "missing_syncwarp", "missing_pipeline_barrier"]


@pytest.mark.parametrize("name", RACES)
def test_thread_sanitizer_finds_races(thread_sanitized: Path, name: str) -> None:
    assert "data race" in run_sanitized(thread_sanitized, name, broken=True).stderr


@pytest.mark.parametrize("name", RACES)
def test_thread_sanitizer_passes_clean_kernels(thread_sanitized: Path, name: str) -> None:
    done = run_sanitized(thread_sanitized, name, broken=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "right\n", "")
