"""Step 1, supervised fine-tuning: cross-entropy on the completions alone."""

from __future__ import annotations

import math

import torch
from datasets import Dataset
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf import distributed
from rlhf.checkpoint import Checkpoints
from rlhf.config import SFTConfig
from rlhf.data import RowBatches, collate_right
from rlhf.engines import Engine, Engines, PlainEngine, TrainingEngine
from rlhf.models import completion_logprobs
from rlhf.tracking import Tracker
from rlhf.trainers.columns import Columns, micro_batches, pieces
from rlhf.trainers.loop import Metrics, train_epochs


class SFTTrainer:
    """Trains a causal language model on encoded demonstrations (input_ids, loss_mask)."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        config: SFTConfig,
        *,
        seed: int = 0,
        engines: Engines | None = None,
    ) -> None:
        self._model = model
        self._engines = engines or Engines()
        self.engine: Engine = PlainEngine(model)  # from `train` on the one that trains
        self._pad_id: int = tokenizer.pad_token_id
        self._config = config
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
        config = self._config
        lengths = [len(ids) for ids in rows["input_ids"]]
        batches = RowBatches(len(rows), config.batch_size, lengths=lengths, seed=self._seed)
        steps = len(batches) * config.epochs
        engine = self._engines.training(self._model, config.optimizer, total_steps=steps)
        self.engine = engine
        return train_epochs(
            engine,
            batches,
            lambda indices: self._train_batch(engine, rows[indices]),
            None if heldout is None else lambda: self.evaluate(heldout),
            config,
            lengths=lengths,
            tracker=tracker,
            console=console,
            checkpoints=checkpoints,
        )

    def evaluate(self, rows: Dataset) -> Metrics:
        """Mean loss per completion token, and its exponential."""
        self._model.eval()
        total, count = 0.0, 0.0
        with torch.no_grad():
            for piece in pieces(rows):
                for batch, weight in micro_batches(piece, self._config.micro_batch_size):
                    logprobs = self._logprobs(batch)
                    total -= weight * float(logprobs.sum())
                    count += weight * logprobs.numel()
        total, count = distributed.total(total, count)
        loss = total / max(1.0, count)
        return {"eval/loss": loss, "eval/perplexity": math.exp(min(loss, 50.0))}

    def _train_batch(self, engine: TrainingEngine, batch: Columns) -> Metrics:
        count = sum(sum(mask[1:]) for mask in batch["loss_mask"])
        total = 0.0
        for micro, weight in micro_batches(batch, self._config.micro_batch_size):
            loss = -self._logprobs(micro).sum() * (weight / max(1, count))
            engine.backward(loss)
            total += float(loss.detach())
        return {"loss": distributed.total(total)[0]}

    def _logprobs(self, batch: Columns) -> Tensor:
        device = next(self._model.parameters()).device
        input_ids, _ = collate_right(batch["input_ids"], self._pad_id)
        loss_mask, _ = collate_right(batch["loss_mask"], 0)
        loss_mask = loss_mask.bool().to(device)
        return self.engine(completion_logprobs, input_ids.to(device), loss_mask)
