"""Epochs over rows: what SFT, reward model and DPO have in common."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from rlhf import distributed
from rlhf.checkpoint import Checkpoints
from rlhf.data import RowBatches
from rlhf.engines import TrainingEngine
from rlhf.manifest import (
    read_manifest,
    remove,
    remove_leftovers,
    step_folder,
    steps_in,
    written_together,
)
from rlhf.tracking import ProgressBar, Tracker

Metrics = dict[str, float]

WATCHED = ("loss", "accuracy", "rewards/accuracies", "eval/loss")  # beside the progress bar


def best_folder(folder: Path, step: str) -> Path:
    """Where a step keeps its best weights until its model is saved."""
    return folder / f".{step}.best"


class BestWeights:
    """What the engine was when the held-out loss was lowest, on disk until the model is saved.

    An older best stays as long as there is a checkpoint from which it was the best.
    """

    def __init__(
        self, engine: TrainingEngine, folder: Path, checkpoints: Checkpoints | None = None
    ) -> None:
        self.step = 0  # of the best evaluation, 0: none yet
        self.metrics: Metrics = {}
        self._is_written = False  # else the engine has them
        self._engine = engine
        self._folder = folder
        self._checkpoints = checkpoints

    def begin(self, done: int) -> None:
        """After so many steps: what another run wrote later, this one does not know."""
        if distributed.is_first():
            remove_leftovers(self._folder)
            self._remove(step for step in steps_in(self._folder) if step > done)
        distributed.barrier()

    def offer(self, step: int, metrics: Metrics, *, last: bool, keep: bool) -> None:
        """Keep the weights of this evaluation if they are better; without `keep`, only the last."""
        better = not self.metrics or metrics["eval/loss"] < self.metrics["eval/loss"]
        if not (better if keep else last):
            return
        self.step, self.metrics = step, {**metrics, "eval/step": float(step)}
        self._is_written = not last
        if last:  # the engine has them
            return
        with written_together(step_folder(self._folder, step), step=step) as folder:
            self._engine.save(folder)
        if distributed.is_first():
            self._remove({*steps_in(self._folder)} - {step, *self._of_checkpoints()})
        distributed.barrier()

    def take_back(self) -> None:
        """Give the engine its best weights again. They stay on disk: saving them may yet fail."""
        if self._is_written:
            self._engine.load(step_folder(self._folder, self.step))
        distributed.barrier()

    def forget(self) -> None:
        """Nothing will be taken back any more."""
        if distributed.is_first():
            shutil.rmtree(self._folder, ignore_errors=True)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "metrics": self.metrics, "is_written": self._is_written}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError where the weights on disk are not those that were written."""
        self.step, self.metrics = state["step"], state["metrics"]
        self._is_written = state["is_written"]
        if self._is_written:
            distributed.decided_by_first(self._check)

    def _check(self) -> None:
        folder = step_folder(self._folder, self.step)
        advice = "it has the best weights so far; remove this step's checkpoints to start anew"
        if read_manifest(folder, advice=advice)["step"] != self.step:
            raise ValueError(f"{folder} is of another step; {advice}")

    def _of_checkpoints(self) -> Iterator[int]:
        """The steps that were the best when the checkpoints there are were written."""
        for checkpoint in self._checkpoints.steps() if self._checkpoints else ():
            yield max((n for n in steps_in(self._folder) if n <= checkpoint), default=0)

    def _remove(self, steps: Iterable[int]) -> None:
        for step in steps:
            remove(step_folder(self._folder, step))


class Schedule(Protocol):
    """What the configurations of these steps share."""

    @property
    def epochs(self) -> int: ...
    @property
    def eval_steps(self) -> int | None: ...
    @property
    def keep_best(self) -> bool: ...


def train_epochs(
    engine: TrainingEngine,
    batches: RowBatches,
    train_batch: Callable[[list[int]], Metrics],
    evaluate: Callable[[], Metrics] | None,
    schedule: Schedule,
    *,
    lengths: Sequence[int],
    tracker: Tracker,
    console: Console,
    checkpoints: Checkpoints | None = None,
) -> Metrics:
    """Train, evaluate now and then, and end with the best weights, or the last.

    Args:
        train_batch: backward passes of the rows with these indices; returns what to log.
        evaluate: measures "eval/loss" and others on held-out rows; None: never.
        lengths: tokens of each row, for the progress bar.

    Returns the evaluation of the weights that the engine ends with, and its step as "eval/step";
    {} without `evaluate`.
    """
    steps = len(batches) * schedule.epochs
    every = schedule.eval_steps or len(batches)
    best = BestWeights(engine, best_folder(tracker.folder, tracker.name), checkpoints)
    done = 0
    if checkpoints is not None:
        done = checkpoints.begin({"model": engine}, {"data": batches, "best": best})
    best.begin(done)
    tracker.rewind(done)
    with ProgressBar(tracker.name, steps, console, done=done) as bar:
        for step in range(done + 1, steps + 1):
            engine.module.train()
            indices = next(batches)
            metrics = train_batch(indices)
            info = engine.step()
            metrics |= {"lr": info.learning_rate, **info.metrics()}
            if evaluate is not None and (step == steps or step % every == 0):
                found = evaluate()
                metrics |= found
                best.offer(step, found, last=step == steps, keep=schedule.keep_best)
            tracker.log(step, metrics)
            watched = {name: metrics[name] for name in WATCHED if name in metrics}
            bar.advance(tokens=sum(lengths[i] for i in indices), **watched)
            if checkpoints is not None:
                checkpoints.after(step, last=steps)
    best.take_back()
    if checkpoints is None:
        best.forget()
    return best.metrics
