"""Which steps of a run have ended, and what they found: what `--resume` passes over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from rlhf import distributed
from rlhf.checkpoint import Checkpoints
from rlhf.config import CheckpointConfig
from rlhf.files import finished_file


class Progress:
    """The folder `checkpoints` of a run: a file for each step that has ended, a folder for others.

    A run that does not resume begins with nothing.
    """

    def __init__(self, folder: Path, config: CheckpointConfig, *, resume: bool) -> None:
        self._folder = folder / "checkpoints"
        self._config = config
        self.resume = resume

    def begin(self, *steps: str) -> None:
        """Before anything is written. Raises ValueError where one did not end, without --resume."""
        for step in steps:
            checkpoints = Checkpoints(
                self._folder / step, self._config, every=1, resume=self.resume
            )
            distributed.decided_by_first(checkpoints.refuse_unfinished)

    def checkpoints(self, step: str) -> Checkpoints:
        """Of a step that begins, or goes on. Raises ValueError where it has ended already."""
        every = self._config.every_iterations if step == "ppo" else self._config.every_steps
        if self.results(step) is not None:
            raise ValueError(
                f"there is nothing to resume: {step} has ended; leave out --resume to do it again"
            )
        if distributed.is_first():
            self._record(step).unlink(missing_ok=True)
        return Checkpoints(self._folder / step, self._config, every=every, resume=self.resume)

    def end(self, step: str, **results: Any) -> None:
        """The step's models stand, with these results of it: JSON."""
        if distributed.is_first():
            self._folder.mkdir(parents=True, exist_ok=True)
            with finished_file(self._record(step)) as unfinished:
                unfinished.write_text(json.dumps(results))
            shutil.rmtree(self._folder / step, ignore_errors=True)

    def results(self, step: str) -> dict[str, Any] | None:
        """What `end` was given by the run that is resumed; None where it had not come so far."""
        if not self.resume:
            return None
        path = self._record(step)
        return distributed.decided_by_first(
            lambda: json.loads(path.read_text()) if path.exists() else None
        )

    def _record(self, step: str) -> Path:
        return self._folder / f"{step}.json"
