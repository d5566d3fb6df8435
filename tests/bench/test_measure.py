"""Taking turns, medians and spreads, the header, and records that survive a round trip."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlhf.bench.measure import (
    Timing,
    append_record,
    interleave,
    machine,
    read_bandwidth,
    read_records,
)


def test_median_and_spread_by_hand() -> None:
    timing = Timing((4.0, 1.0, 2.0, 3.0, 100.0))
    assert timing.median == 3.0
    assert timing.spread == 1.0  # quartiles 2 and 4
    assert Timing((5.0,)).spread == 0.0


def test_contenders_alternate_and_the_warm_up_is_not_counted() -> None:
    order: list[str] = []
    now = iter(range(1000))
    timings = interleave(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        repeats=3,
        warmup=1,
        clock=lambda: float(next(now)),
    )
    assert order == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert {name: len(t.seconds) for name, t in timings.items()} == {"a": 3, "b": 3}


def test_no_repeat_is_no_measurement() -> None:
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        interleave({"a": lambda: None}, repeats=0)


def test_the_header_names_machine_versions_and_commit() -> None:
    header = machine(what="generate")
    assert header["versions"]["torch"] == torch.__version__
    assert header["threads"] == torch.get_num_threads()
    assert header["processor"]
    assert header["commit"]
    assert header["what"] == "generate"


def test_reading_memory_has_a_plausible_rate() -> None:
    assert 1e8 < read_bandwidth(size=1 << 24) < 1e13


def test_records_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "records.jsonl"
    append_record(path, {"a": 1})
    append_record(path, {"a": 2})
    assert read_records(path) == [{"a": 1}, {"a": 2}]
