"""Where metrics go: a JSON line a step, TensorBoard, and a progress bar."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from rlhf import distributed
from rlhf.files import finished_file, make_folder


class Tracker:
    """The metrics of one step of the pipeline, in `<folder>/<name>.jsonl` and TensorBoard.

    The first rank writes. Each step is on disk when `log` returns. Raises OSError where that cannot
    be. With `resume` what an earlier run has written stays, as far as `rewind` lets it.
    """

    def __init__(self, folder: Path, name: str, *, resume: bool = False) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        self.folder, self.name = folder, name
        self.history: list[dict[str, float]] = []
        if not distributed.is_first():
            return
        make_folder(folder)
        board = folder / "tensorboard" / name
        board.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{name}.jsonl"
        self.history = read_history(self._path) if resume else []
        self._lines = self._path.open("a" if resume else "w")
        self._board = RecordWriter((board / f"events.out.tfevents.{time.time_ns()}").open("wb"))
        self._write({}, {"file_version": "brain.Event:2"})

    def rewind(self, step: int) -> None:
        """Forget what comes after a step: training goes on from there."""
        if not distributed.is_first():
            return
        self.history = [record for record in self.history if record["step"] <= step]
        self._lines.close()
        with finished_file(self._path) as unfinished:
            unfinished.write_text("".join(json.dumps(record) + "\n" for record in self.history))
        self._lines = self._path.open("a")
        self._write({}, {"step": step + 1, "session_log": {"status": 1}})  # START: later ones go

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        record = {"step": step, **metrics}
        self.history.append(record)
        values = [{"tag": name, "simple_value": value} for name, value in metrics.items()]
        self._write(record, {"step": step, "summary": {"value": values}})

    def _write(self, record: dict[str, float], event: dict[str, Any]) -> None:
        """By hand, since TensorBoard's own writer is a thread, which fails too late and aloud."""
        if not distributed.is_first():
            return
        from tensorboard.compat.proto.event_pb2 import Event

        try:
            if record:
                self._lines.write(json.dumps(record) + "\n")
                self._lines.flush()
            self._board.write(Event(wall_time=time.time(), **event).SerializeToString())
            self._board.flush()
        except OSError as error:
            raise OSError(f"cannot write the metrics beside {self._path}: {error}") from error

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in (self._lines, self._board) if distributed.is_first() else ():
            with contextlib.suppress(OSError):  # of what is left of a write that failed and said so
                file.close()


def read_history(path: Path) -> list[dict[str, float]]:
    """The records of a metrics file; [] where there is none. A torn last line is left out."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            found.append(json.loads(line))
    return found


class ProgressBar:
    """A bar with steps, tokens per second, time left, and the metrics worth watching.

    The bar itself gives way where a terminal is narrow: 80 columns hold the rest.
    """

    def __init__(self, title: str, steps: int, console: Console, *, done: int = 0) -> None:
        whole = Column(no_wrap=True)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None, table_column=Column(max_width=24)),
            MofNCompleteColumn(table_column=whole),
            TextColumn("left"),
            TimeRemainingColumn(table_column=whole),
            TextColumn("{task.fields[status]}"),
            console=console,
        )
        self._task = self._progress.add_task(title, total=steps, completed=done, status="")
        self._tokens = 0

    def advance(self, *, tokens: int, **watched: float) -> None:
        """One step more; of `watched` the first two are shown."""
        self._tokens += tokens
        self._progress.advance(self._task)
        elapsed = self._progress.tasks[0].elapsed or 1e-9
        parts = [f"{self._tokens / elapsed:,.0f} tokens/s"]
        parts += [f"{name} {value:.3f}" for name, value in list(watched.items())[:2]]
        self._progress.update(self._task, status="  ".join(parts))

    def __enter__(self) -> ProgressBar:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()


class Stopwatch:
    """Seconds by name: `with watch("rollout"): ...` adds to `watch.seconds["rollout"]`.

    Work that a GPU still has in hand when a lap begins or ends is waited for, so it counts where it
    was asked for.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str) -> _Lap:
        return _Lap(self.seconds, name)


class _Lap:
    def __init__(self, seconds: dict[str, float], name: str) -> None:
        self._seconds = seconds
        self._name = name

    def __enter__(self) -> None:
        synchronize()
        self._start = time.perf_counter()

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None:  # a device that has failed would raise again, in place of the first error
            synchronize()
        elapsed = time.perf_counter() - self._start
        self._seconds[self._name] = self._seconds.get(self._name, 0.0) + elapsed


def synchronize() -> None:
    """Wait for the GPU, where this process uses one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
