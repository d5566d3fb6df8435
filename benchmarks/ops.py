"""Every op at decode shapes against the plain PyTorch expression, alternating in one run.

    pytest benchmarks/ops.py            # all, some minutes; -k rms_norm for one op

A case first checks its result against the expression in fp64, and is not timed when it is off. The
cases are in `benchmarks/cases`, a file for each family.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.cases import (
    activation,
    advantage,
    attention,
    gather,
    linear,
    norm,
    rope,
    sampling,
)
from benchmarks.cases.case import Case, assert_correct
from rlhf.bench.measure import busy_clock

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROUNDS = 15
ROUND_SECONDS = 2e-3
FAMILIES = (norm, activation, rope, attention, sampling, linear, gather, advantage)
FP32_ONLY = tuple(advantage.SWEEPS)
WIDTH_LETTERS = {**dict.fromkeys(sampling.SWEEPS, "V"), **dict.fromkeys(advantage.SWEEPS, "T")}


def parameters() -> list[Any]:
    return [
        pytest.param(
            make, batch, width, dtype, id=f"{make.__name__}-B{batch}-{letter}{width}-{name}"
        )
        for family in FAMILIES
        for make, (batches, widths) in family.SWEEPS.items()
        for letter in (WIDTH_LETTERS.get(make, "D"),)
        for width in widths
        for batch in batches
        for name, dtype in DTYPES.items()
        if dtype == torch.float32 or make not in FP32_ONLY
    ]


class Timer:
    """Seconds a call, over rounds of as many calls as make a round long enough to time."""

    def __init__(self, function: Callable[..., Any], operands: list[tuple[Any, ...]]) -> None:
        self.function, self.operands, self.place, self.samples = function, operands, 0, []
        self.calls = 1
        while (seconds := self.round()) < ROUND_SECONDS:
            self.calls = max(2 * self.calls, int(self.calls * ROUND_SECONDS / (seconds + 1e-9)))
            self.calls = min(self.calls, 4096)
            if self.calls == 4096:
                break
        self.samples: list[float] = []

    def round(self) -> float:
        start = busy_clock()
        for _ in range(self.calls):
            self.function(*self.operands[self.place])
            self.place = (self.place + 1) % len(self.operands)
        elapsed = busy_clock() - start
        self.samples.append(elapsed / self.calls)
        return elapsed

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


@pytest.mark.parametrize(("make", "batch", "width", "dtype"), parameters())
def test_op(benchmark: Any, make: Any, batch: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    with torch.inference_mode():  # as rollouts run
        measure(benchmark, make(batch, width, dtype))


def measure(benchmark: Any, case: Case) -> None:
    assert_correct(case)
    ours, plain = Timer(case.ours, case.operands), Timer(case.plain, case.operands)
    # The baseline's round is the set-up of each of ours, so that the two alternate.
    benchmark.pedantic(ours.round, setup=lambda: plain.round() and None, rounds=ROUNDS)
    low, high = statistics.quantiles(ours.samples, n=4)[::2]
    benchmark.extra_info.update(
        op=case.op,
        ours_us=1e6 * ours.median,
        spread_us=1e6 * (high - low) / 2,
        baseline_us=1e6 * plain.median,
        bytes=case.bytes,
        cold=case.cold,
    )
