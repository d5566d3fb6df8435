"""What the steps share: output folder, engines, seeds, and the report that they fill."""

from __future__ import annotations

import contextlib
import random
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf import distributed
from rlhf.config import RunConfig
from rlhf.engines import Engine, Engines
from rlhf.evaluation import RunReport
from rlhf.models import save_model
from rlhf.progress import Progress
from rlhf.rewards import load_function
from rlhf.tracking import Stopwatch, Tracker, read_history
from rlhf.trainers.loop import best_folder


class Workspace:
    """Of one run: what its steps find here, and what they leave."""

    def __init__(self, config: RunConfig, console: Console | None, *, resume: bool) -> None:
        self.config = config
        self.folder = Path(config.output_dir)
        self.engines = Engines(config.training, zero_stage=config.zero_stage)
        self.progress = Progress(self.folder, config.checkpoint, resume=resume)
        self.report = RunReport()
        self.console = console or Console(quiet=not distributed.is_first())
        self.watch = Stopwatch()
        metric = config.evaluation.metric
        self.metric = load_function(metric, option="evaluation.metric") if metric else None
        self.dtype: torch.dtype = getattr(torch, config.model.dtype)

    @contextlib.contextmanager
    def step(self, name: str, title: str) -> Iterator[None]:
        """Time what a step does, and let its chance depend on the seed alone."""
        self.progress.begin(name)
        with self.watch(title):
            torch.manual_seed(self.config.seed)
            random.seed(self.config.seed)
            yield

    def models_are_ready(self, parameters: int) -> None:
        """All ranks have the same; from here on chance, such as dropout, is to differ."""
        self.report.parameters = parameters
        if distributed.rank():
            torch.manual_seed(self.config.seed + 1_000_003 * distributed.rank())

    def tracker(self, step: str) -> Tracker:
        return Tracker(self.folder, step, resume=self.progress.resume)

    def from_step(self, step: str, option: str) -> str:
        """The folder of an earlier step's model. Raises ValueError if it is not there."""
        folder = self.folder / step
        if not (folder / "config.json").exists():
            raise ValueError(
                f"no {step} model in {folder}: run `rlhf {step}` with this output_dir first, or "
                f"give --{option}"
            )
        return str(folder)

    def save(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        *,
        base: str | None,
        over: Mapping[str, Tensor] | None = None,
    ) -> None:
        """A model's folder in the output folder; `over` are weights to take in place of its own."""
        weights = engine.weights()
        dtypes = {n: weights[n].dtype for n in over or ()}
        weights |= {n: weight.to(dtypes[n]) for n, weight in (over or {}).items()}
        path = self.folder / name
        distributed.decided_by_first(
            lambda: save_model(engine.module, tokenizer, path, base=base, weights=weights)
        )

    def end(self, step: str, **results: Any) -> None:
        """A step's models stand: with these results there is nothing of it to resume."""
        seconds, parameters = self.watch.seconds, self.report.parameters
        self.progress.end(step, seconds=seconds, parameters=parameters, **results)
        if distributed.is_first():
            shutil.rmtree(best_folder(self.folder, step), ignore_errors=True)

    def restore(self, step: str) -> bool:
        """Whether the run that is resumed had ended a step; its results are in the report then."""
        results = self.progress.results(step)
        if results is None:
            return False
        self.report.seconds |= results.pop("seconds")
        for name, value in results.items():
            setattr(self.report, name, value)
        self.report.histories[step] = read_history(self.folder / f"{step}.jsonl")
        return True
