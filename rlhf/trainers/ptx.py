"""Mixture training: language-model gradients beside PPO's (PPO-ptx, arXiv 2203.02155, eq. 2)."""

from __future__ import annotations

from typing import Any

from datasets import Dataset

from rlhf.data import RowBatches
from rlhf.engines import TrainingEngine
from rlhf.trainers.columns import micro_batches, row_lengths
from rlhf.trainers.sft import demonstration_logprobs


class MixtureData:
    """Encoded demonstrations or text, {input_ids, loss_mask}, drawn without end."""

    def __init__(self, rows: Dataset, batch_size: int, *, pad_id: int, seed: int = 0) -> None:
        self._rows = rows
        self._pad_id = pad_id
        self.batches = RowBatches(len(rows), batch_size, lengths=row_lengths(rows), seed=seed)

    def backward(self, engine: TrainingEngine, *, coef: float, micro_batch_size: int) -> float:
        """Gradients of coef * the mean loss per trained token of the next batch.

        Returns this rank's part of the mean loss.
        """
        batch: dict[str, list[Any]] = self._rows[next(self.batches)]
        tokens = max(1, sum(sum(mask[1:]) for mask in batch["loss_mask"]))
        total = 0.0
        for micro, weight in micro_batches(batch, micro_batch_size):
            logprobs = demonstration_logprobs(engine, micro, self._pad_id)
            loss = -logprobs.sum() * (weight / tokens)
            engine.backward(coef * loss)
            total += float(loss.detach())
        return total
