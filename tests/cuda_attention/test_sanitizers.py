"""The kernels under AddressSanitizer, with every operand an allocation of its exact size, and under
ThreadSanitizer, which reports a race between the threads of a block whatever their order."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.cuda_emulator.build import CSRC, ORDERS, build_program, why_unavailable

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))

SOURCES = [CSRC / "cuda/attention.cu", Path(__file__).with_name("sanitizer_main.cu")]
FLAGS = {"address": ["-fsanitize=address", "-O1"], "thread": ["-fsanitize=thread"]}
QUIET = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "atexit_sleep_ms=0"}
FP32, BF16, FP16 = 0, 1, 2  # he::DType

CASES = {  # dtype, heads, kv heads, head dim, queries, keys, splits
    "decode-D64-bf16": (BF16, 8, 2, 64, 1, 70, 1),
    "decode-D128-bf16-splits3": (BF16, 8, 1, 128, 1, 130, 3),
    "decode-D256-fp16": (FP16, 4, 4, 256, 1, 70, 0),
    "prefill-D72-bf16": (BF16, 8, 2, 72, 33, 50, 1),
    "prefill-D128-bf16": (BF16, 4, 4, 128, 40, 100, 0),
    "decode-D64-fp32-splits2": (FP32, 8, 2, 64, 1, 70, 2),
    "prefill-D64-fp32": (FP32, 8, 2, 64, 9, 40, 1),
    "prefill-D7-fp16": (FP16, 3, 1, 7, 5, 33, 1),
}


@pytest.fixture(scope="module", params=["address", pytest.param("thread", marks=pytest.mark.slow)])
def program(request: pytest.FixtureRequest) -> Path:
    return build_program(SOURCES, FLAGS[request.param])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_nothing_to_report(program: Path, case: tuple[int, ...]) -> None:
    schedule = (ORDERS.index("greedy"), 0)
    done = subprocess.run(
        [str(program), *map(str, (*case, *schedule))],
        env={**os.environ, **QUIET},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert int(done.stdout) > 0
