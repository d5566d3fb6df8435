"""Checkpoints of a training step: all that it takes to go on as if nothing had happened.

A checkpoint is a folder `step-<n>`, which the ranks write together (`rlhf.manifest`).
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from rlhf import distributed
from rlhf.config import CheckpointConfig
from rlhf.manifest import (
    read_manifest,
    remove,
    remove_leftovers,
    step_folder,
    steps_in,
    written_together,
)

STATE = "state.pt"


class Saved(Protocol):
    """Writes what it has to remember into a folder of its own; all ranks at once."""

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


class Stateful(Protocol):
    """Remembers something that is the same on every rank."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Checkpoints:
    """The checkpoints of one training step of the pipeline, in `folder`.

    `begin`, then `after` each step; both by all ranks together.
    """

    def __init__(
        self, folder: Path, config: CheckpointConfig, *, every: int, resume: bool = False
    ) -> None:
        self._folder = folder
        self._keep = config.keep
        self._every = every
        self._resume = resume
        self._engines: Mapping[str, Saved] = {}
        self._states: Mapping[str, Stateful] = {}

    def begin(self, engines: Mapping[str, Saved], states: Mapping[str, Stateful]) -> int:
        """Say what has to be remembered; when resuming, load it. Returns the finished steps.

        Raises ValueError where there is an unfinished run and this is not to resume it, and for a
        checkpoint that is torn or of another run.
        """
        self._engines, self._states = engines, states
        newest = distributed.decided_by_first(self._newest)
        if newest is None:
            return 0
        step = distributed.decided_by_first(lambda: self._check(newest))
        for name, engine in engines.items():
            engine.load(newest / name)
        state = torch.load(newest / STATE, weights_only=True)
        for name, part in states.items():
            part.load_state_dict(state[name])
        ours = newest / _random_file()
        if ours.exists():  # not on more ranks than there were
            restore_random_state(torch.load(ours, weights_only=True))
        return step

    def after(self, step: int, *, last: int) -> None:
        """When `step` of `last` steps is done. Saves every so many, and after the last one."""
        if self._every and (step % self._every == 0 or step == last):
            self._save(step)

    def steps(self) -> list[int]:
        """After which there are whole checkpoints, in order."""
        return steps_in(self._folder)

    def _save(self, step: int) -> None:
        with written_together(step_folder(self._folder, step), *self._engines, step=step) as folder:
            for name, engine in self._engines.items():
                engine.save(folder / name)
            torch.save(random_state(), folder / _random_file())
            if distributed.is_first():
                states = {name: part.state_dict() for name, part in self._states.items()}
                torch.save(states, folder / STATE)
        if distributed.is_first():
            for old in self.steps()[: -self._keep]:
                remove(step_folder(self._folder, old))
        distributed.barrier()

    def _newest(self) -> Path | None:
        remove_leftovers(self._folder)
        self.refuse_unfinished()
        steps = self.steps()
        return step_folder(self._folder, steps[-1]) if steps else None

    def refuse_unfinished(self) -> None:
        """Raises ValueError where a run did not end and this one does not go on with it."""
        steps = self.steps()
        if steps and not self._resume:
            raise ValueError(
                f"{self._folder} has checkpoints of a run that did not end: give --resume to go on "
                f"from {step_folder(self._folder, steps[-1]).name}, or remove that folder to start "
                "anew"
            )

    def _check(self, folder: Path) -> int:
        """The step of a checkpoint; ValueError if it is not as it was written."""
        advice = f"remove {folder} to resume from the checkpoint before it, or to start anew"
        manifest = read_manifest(folder, advice=advice)
        if missing := {*self._engines} - {name.split("/")[0] for name in manifest["files"]}:
            raise ValueError(
                f"{folder} is a checkpoint of another training step: it has no {min(missing)}; "
                f"{advice}"
            )
        return manifest["step"]


def random_state() -> dict[str, Any]:
    """Every random number generator of this process."""
    _, keys, *rest = np.random.get_state(legacy=True)
    state = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (torch.from_numpy(np.asarray(keys).astype(np.int64)), rest),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    keys, rest = state["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _random_file() -> str:
    return f"random_{distributed.rank()}.pt"
