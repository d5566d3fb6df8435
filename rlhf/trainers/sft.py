"""Step 1, supervised fine-tuning: cross-entropy on the completions alone."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from datasets import Dataset
from torch import Tensor

from rlhf import distributed
from rlhf.config import SFTConfig
from rlhf.data import collate_right
from rlhf.engines import Engine, TrainingEngine
from rlhf.models import completion_logprobs
from rlhf.trainers.columns import Columns, micro_batches, pieces
from rlhf.trainers.loop import Metrics
from rlhf.trainers.supervised import SupervisedTrainer


class SFTTrainer(SupervisedTrainer[SFTConfig]):
    """Trains a causal language model on encoded demonstrations (input_ids, loss_mask)."""

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

    def _evaluation_of(self, heldout: Dataset) -> Callable[[], Metrics]:
        return lambda: self.evaluate(heldout)

    def _train_batch(self, engine: TrainingEngine, batch: Columns) -> Metrics:
        count = sum(sum(mask[1:]) for mask in batch["loss_mask"])
        total = 0.0
        for micro, weight in micro_batches(batch, self._config.micro_batch_size):
            loss = -self._logprobs(micro).sum() * (weight / max(1, count))
            engine.backward(loss)
            total += float(loss.detach())
        return {"loss": distributed.total(total)[0]}

    def _logprobs(self, batch: Columns) -> Tensor:
        return demonstration_logprobs(self.engine, batch, self._pad_id)


def demonstration_logprobs(engine: Engine, batch: Columns, pad_id: int) -> Tensor:
    """(N,) of the tokens in the loss masks of {input_ids, loss_mask}."""
    device = next(engine.module.parameters()).device
    input_ids, _ = collate_right(batch["input_ids"], pad_id)
    loss_mask, _ = collate_right(batch["loss_mask"], 0)
    return engine(completion_logprobs, input_ids.to(device), loss_mask.bool().to(device))
