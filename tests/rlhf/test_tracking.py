"""Metrics on disk, the bar on the terminal, and the clock."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path

import pytest
import torch
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


class PendingWork:
    """A device that works when it is waited for, as long as was asked of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seconds = 0.0
        monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
        monkeypatch.setattr("torch.cuda.synchronize", self.finish)

    def finish(self) -> None:
        seconds, self.seconds = self.seconds, 0.0
        time.sleep(seconds)


def test_stopwatch_counts_device_work_where_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    device, watch = PendingWork(monkeypatch), Stopwatch()
    device.seconds = 0.2  # of nobody
    with watch("score"):
        device.seconds = 0.03
    with watch("update"):
        device.seconds = 0.06
    assert 0.03 <= watch.seconds["score"] < 0.06 <= watch.seconds["update"] < 0.2


def test_stopwatch_leaves_the_error_of_a_failed_device_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken() -> None:
        raise RuntimeError("CUDA error, again")

    watch = Stopwatch()

    def fail() -> None:
        with watch("score"):
            monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
            monkeypatch.setattr("torch.cuda.synchronize", broken)
            raise KeyError("the first one")

    with pytest.raises(KeyError, match="the first one"):
        fail()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
def test_stopwatch_waits_for_the_gpu() -> None:
    watch = Stopwatch()
    with watch("asked"):
        torch.cuda._sleep(2 * 10**8)  # clock cycles: a tenth of a second
    with watch("nothing"):
        pass
    assert watch.seconds["asked"] > 0.03 > 10 * watch.seconds["nothing"]
