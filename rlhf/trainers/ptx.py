"""Mixture training: language-model gradients beside PPO's (PPO-ptx, arXiv 2203.02155, eq. 2)."""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from torch import Tensor

from rlhf.data import RowBatches, collate_right
from rlhf.engines import TrainingEngine
from rlhf.models import completion_logprobs
from rlhf.trainers.columns import Columns, micro_batches


class MixtureData:
    """Encoded demonstrations or text, {input_ids, loss_mask}, drawn without end."""

    def __init__(self, rows: Dataset, batch_size: int, *, pad_id: int, seed: int = 0) -> None:
        lengths = [len(ids) for ids in rows["input_ids"]]
        self._rows = rows
        self._pad_id = pad_id
        self.batches = RowBatches(len(rows), batch_size, lengths=lengths, seed=seed)

    def backward(self, engine: TrainingEngine, *, coef: float, micro_batch_size: int) -> float:
        """Gradients of coef * the mean loss per trained token of the next batch.

        Returns this rank's part of the mean loss.
        """
        batch: dict[str, list[Any]] = self._rows[next(self.batches)]
        tokens = max(1, sum(sum(mask[1:]) for mask in batch["loss_mask"]))
        total = 0.0
        for micro, weight in micro_batches(batch, micro_batch_size):
            loss = -self._logprobs(engine, micro).sum() * (weight / tokens)
            engine.backward(coef * loss)
            total += float(loss.detach())
        return total

    def _logprobs(self, engine: TrainingEngine, micro: Columns) -> Tensor:
        device = next(engine.module.parameters()).device
        input_ids, _ = collate_right(micro["input_ids"], self._pad_id)
        loss_mask, _ = collate_right(micro["loss_mask"], 0)
        loss_mask = loss_mask.bool().to(device)
        return engine(completion_logprobs, input_ids.to(device), loss_mask)
