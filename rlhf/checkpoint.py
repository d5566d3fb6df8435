"""Checkpoints of a training step: all that it takes to go on as if nothing had happened.

A checkpoint is a folder `step-<n>`. Every rank writes its part into `step-<n>.unfinished`; when all
parts are on the disk the first rank renames it. So whatever is killed, and whenever, each folder
without a suffix is whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from rlhf import distributed
from rlhf.config import CheckpointConfig

MANIFEST = "manifest.json"
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

    def _save(self, step: int) -> None:
        final = self._folder / f"step-{step:08d}"
        unfinished = final.with_suffix(".unfinished")
        if distributed.is_first():
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            for name in self._engines:
                (unfinished / name).mkdir()
        distributed.barrier()
        with _full_disk_is_an_os_error(unfinished):
            for name, engine in self._engines.items():
                engine.save(unfinished / name)
            torch.save(random_state(), unfinished / _random_file())
            if distributed.is_first():
                states = {name: part.state_dict() for name, part in self._states.items()}
                torch.save(states, unfinished / STATE)
        distributed.barrier()
        _sync_files(unfinished)
        distributed.barrier()
        if distributed.is_first():
            self._finish(unfinished, final, step)
        distributed.barrier()

    def _finish(self, unfinished: Path, final: Path, step: int) -> None:
        files = {
            str(path.relative_to(unfinished)): path.stat().st_size
            for path in sorted(unfinished.rglob("*"))
            if path.is_file()
        }
        manifest = {"step": step, "ranks": distributed.world_size(), "files": files}
        (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1))
        _sync_files(unfinished)
        if final.exists():  # of the run that this one resumed from an earlier step
            _remove(final)
        os.replace(unfinished, final)
        _sync(self._folder)
        for old in self._finished()[: -self._keep]:
            _remove(old)

    def _newest(self) -> Path | None:
        for leftover in (*self._folder.glob("*.unfinished"), *self._folder.glob("*.removed")):
            shutil.rmtree(leftover, ignore_errors=True)
        self.refuse_unfinished()
        finished = self._finished()
        return finished[-1] if finished else None

    def refuse_unfinished(self) -> None:
        """Raises ValueError where a run did not end and this one does not go on with it."""
        finished = self._finished()
        if finished and not self._resume:
            raise ValueError(
                f"{self._folder} has checkpoints of a run that did not end: give --resume to go on "
                f"from {finished[-1].name}, or remove that folder to start anew"
            )

    def _finished(self) -> list[Path]:
        """Folders of whole checkpoints, the oldest first."""
        return sorted(p for p in self._folder.glob("step-*") if re.fullmatch(r"step-\d+", p.name))

    def _check(self, folder: Path) -> int:
        """The step of a checkpoint; ValueError if it is not as it was written."""
        advice = f"remove {folder} to resume from the checkpoint before it, or to start anew"
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            step, files = int(manifest["step"]), manifest["files"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder} is no checkpoint of rlhf ({error}); {advice}") from error
        for name, size in files.items():
            path = folder / name
            found = path.stat().st_size if path.exists() else None
            if found != size:
                raise ValueError(
                    f"the checkpoint is torn: {path} "
                    + ("is missing" if found is None else f"has {found} bytes, {size} expected")
                    + f"; {advice}"
                )
        if missing := {*self._engines} - {name.split("/")[0] for name in files}:
            raise ValueError(
                f"{folder} is a checkpoint of another training step: it has no {min(missing)}; "
                f"{advice}"
            )
        return step


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


@contextlib.contextmanager
def _full_disk_is_an_os_error(folder: Path) -> Iterator[None]:
    """torch.save raises RuntimeError."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise
        if "PytorchStreamWriter" not in str(error) and "unexpected pos" not in str(error):
            raise
        raise OSError(f"cannot write the checkpoint {folder}: {error}") from error


def _random_file() -> str:
    return f"random_{distributed.rank()}.pt"


def _sync_files(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(folder: Path) -> None:
    """At once under its name; removing the files takes time, and could be interrupted."""
    removed = folder.with_suffix(".removed")
    os.replace(folder, removed)
    shutil.rmtree(removed, ignore_errors=True)
