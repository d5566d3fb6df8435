"""Metrics on disk, the bar on the terminal, and the clock."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlhf.tracking import ProgressBar, Stopwatch, Tracker


def test_metrics_go_to_jsonl_tensorboard_and_history(tmp_path: Path) -> None:
    with Tracker(tmp_path / "run", "ppo") as tracker:
        for step in (1, 2):
            tracker.log(step, {"objective/kl": 0.5 * step, "lr": 1e-3})
    expected = [{"step": s, "objective/kl": 0.5 * s, "lr": 1e-3} for s in (1, 2)]
    assert tracker.history == expected
    lines = (tmp_path / "run" / "ppo.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == expected
    board = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "ppo")).Reload()
    assert [(e.step, e.value) for e in board.Scalars("objective/kl")] == [(1, 0.5), (2, 1.0)]
    assert board.Scalars("lr")[0].value == pytest.approx(1e-3)


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path: Path) -> None:
    """What a killed run has measured is not lost."""
    with Tracker(tmp_path, "sft") as tracker:
        tracker.log(1, {"loss": 2.0})
        assert json.loads((tmp_path / "sft.jsonl").read_text()) == {"step": 1, "loss": 2.0}


def test_an_error_closes_the_files(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, "sft")
    with pytest.raises(KeyError), tracker:
        raise KeyError
    with pytest.raises(ValueError, match="closed file"):
        tracker.log(1, {"loss": 2.0})


def test_a_full_disk_is_said_at_once(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    tracker = Tracker(tmp_path, "sft")
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, hard))
    try:
        with (
            pytest.raises(OSError, match=r"cannot write the metrics .*sft.jsonl.*too large"),
            tracker,
        ):
            tracker.log(1, {f"metric{i}": 0.5 for i in range(10)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_progress_bar_says_where_it_is_and_how_fast(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as file:
        console = Console(file=file, width=120)
        with ProgressBar("PPO", 4, console) as bar:
            time.sleep(0.01)
            for _ in range(3):
                bar.advance(tokens=1000, score=0.5, kl=1.25)
    line = (tmp_path / "out").read_text()
    assert "PPO" in line
    assert "3/4" in line
    assert "tokens/s" in line
    assert "score 0.500" in line
    assert "kl 1.250" in line
    rate = float(line.split(" tokens/s")[0].split()[-1].replace(",", ""))
    assert 0 < rate < 3000 / 0.01


def test_stopwatch_adds_up_by_name() -> None:
    watch = Stopwatch()
    for _ in range(2):
        with watch("rollout"):
            time.sleep(0.02)
    with watch("score"):
        pass
    assert 0.04 <= watch.seconds["rollout"] < 1.0
    assert 0 <= watch.seconds["score"] < 0.02


def test_stopwatch_counts_a_lap_that_failed_and_nests() -> None:
    watch = Stopwatch()

    def fail() -> None:
        with watch("outer"), watch("inner"):
            time.sleep(0.01)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert watch.seconds["outer"] >= watch.seconds["inner"] >= 0.01
