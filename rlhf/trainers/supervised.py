"""What the trainers of SFT, reward model and DPO share: a model, and epochs over encoded rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Generic, TypeVar

from datasets import Dataset
from rich.console import Console
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf.checkpoint import Checkpoints
from rlhf.config import DPOConfig, RewardConfig, SFTConfig
from rlhf.data import RowBatches
from rlhf.engines import Engine, Engines, PlainEngine, Role, TrainingEngine
from rlhf.tracking import Tracker
from rlhf.trainers.columns import Columns, row_lengths
from rlhf.trainers.loop import Metrics, train_epochs

C = TypeVar("C", SFTConfig, RewardConfig, DPOConfig)


class SupervisedTrainer(ABC, Generic[C]):
    """A subclass says what a batch teaches, and how held-out rows are measured."""

    role: Role = "actor"  # whose place in `training` the model has

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        config: C,
        *,
        seed: int = 0,
        engines: Engines | None = None,
    ) -> None:
        self._model = model
        self._engines = engines or Engines()
        self.engine: Engine = PlainEngine(model)  # from `train` on the one that trains
        self._pad_id: int = tokenizer.pad_token_id
        self._config: C = config
        self._seed = seed

    def train(
        self,
        rows: Dataset,
        *,
        tracker: Tracker,
        console: Console,
        heldout: Dataset | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> Metrics:
        """Returns the evaluation of the weights that are kept, {} without `heldout`."""
        config, lengths = self._config, row_lengths(rows)
        batches = RowBatches(len(rows), config.batch_size, lengths=lengths, seed=self._seed)
        steps = len(batches) * config.epochs
        engine = self._engines.training(
            self._model, config.optimizer, total_steps=steps, role=self.role
        )
        self.engine = engine
        batch_of = self._batches_of(rows)
        return train_epochs(
            engine,
            batches,
            lambda indices: self._train_batch(engine, batch_of(indices)),
            None if heldout is None else self._evaluation_of(heldout),
            config,
            lengths=lengths,
            tracker=tracker,
            console=console,
            checkpoints=checkpoints,
        )

    def _batches_of(self, rows: Dataset) -> Callable[[list[int]], Columns]:
        """What `_train_batch` is given of the rows with some indices."""
        return lambda indices: rows[indices]

    @abstractmethod
    def _evaluation_of(self, heldout: Dataset) -> Callable[[], Metrics]:
        """Measures "eval/loss" and others, as often as it is called."""

    @abstractmethod
    def _train_batch(self, engine: TrainingEngine, batch: Columns) -> Metrics:
        """Backward passes of a batch; returns what to log."""
