"""Direct preference optimisation: the policy learns from pairs, without a reward model.

The reference is the policy as it comes in; its log-probs are taken once, before the first step, so
no second model is in memory while the policy trains.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from datasets import Dataset
from torch import Tensor

from rlhf import distributed
from rlhf.config import DPOConfig
from rlhf.data import collate_right
from rlhf.engines import TrainingEngine
from rlhf.losses import DPOLoss, dpo_loss
from rlhf.models import sequence_logprobs
from rlhf.trainers.columns import Columns, micro_batches, pieces
from rlhf.trainers.loop import Metrics
from rlhf.trainers.supervised import SupervisedTrainer


class DPOTrainer(SupervisedTrainer[DPOConfig]):
    """Trains a causal language model on encoded pairs (Preference)."""

    @torch.no_grad()
    def logprobs(self, rows: Dataset) -> Tensor:
        """Log-probs (n, 2) of the chosen and the rejected completion of each pair, on the CPU."""
        self._model.eval()
        found = torch.zeros(len(rows), 2)
        start = 0
        for piece in pieces(rows):
            count = len(piece["chosen_ids"])
            piece["place"] = list(range(start, start + count))
            start += count
            for pairs, weight in micro_batches(piece, self._config.micro_batch_size):
                part = torch.stack(self._pair_logprobs(pairs), 1).cpu()
                found[pairs["place"]] += weight * part
        return torch.tensor(distributed.total(*found.flatten().tolist())).view(-1, 2)

    @torch.no_grad()
    def evaluate(self, rows: Dataset, reference: Tensor) -> Metrics:
        """The loss per pair and what the policy prefers, with the reference's log-probs (n, 2)."""
        chosen, rejected = self.logprobs(rows).unbind(1)
        result = self._loss(chosen, rejected, reference)
        metrics = {"loss": float(result.loss) / len(rows), **_preferences(result)}
        return {f"eval/{name}": value for name, value in metrics.items()}

    def _batches_of(self, rows: Dataset) -> Callable[[list[int]], Columns]:
        """With a column of the reference's log-probs."""
        reference = self.logprobs(rows)
        return lambda indices: {**rows[indices], "reference": reference[indices].tolist()}

    def _evaluation_of(self, heldout: Dataset) -> Callable[[], Metrics]:
        reference = self.logprobs(heldout)
        return lambda: self.evaluate(heldout, reference)

    def _train_batch(self, engine: TrainingEngine, batch: Columns) -> Metrics:
        count = len(batch["chosen_ids"])
        sums: Metrics = {}
        for pairs, weight in micro_batches(batch, self._config.micro_batch_size):
            chosen, rejected = self._pair_logprobs(pairs)
            given = torch.tensor(pairs["reference"], device=chosen.device)
            result = self._loss(chosen, rejected, given)
            engine.backward(result.loss * (weight / count))
            part = {
                "loss": float(result.loss.detach()) / len(chosen),
                **_preferences(result),
                "logps/chosen": float(chosen.detach().mean()),
                "logps/rejected": float(rejected.detach().mean()),
            }
            share = weight * len(chosen) / count
            sums = {name: sums.get(name, 0.0) + share * value for name, value in part.items()}
        return dict(zip(sums, distributed.total(*sums.values()), strict=True))

    def _loss(self, chosen: Tensor, rejected: Tensor, reference: Tensor) -> DPOLoss:
        config = self._config
        return dpo_loss(
            chosen, rejected, *reference.unbind(1),
            beta=config.beta, kind=config.loss, label_smoothing=config.label_smoothing,
        )  # fmt: skip

    def _pair_logprobs(self, pairs: Columns) -> tuple[Tensor, Tensor]:
        """(B,) and (B,), from one forward over both sides."""
        device = next(self._model.parameters()).device
        sequences = pairs["chosen_ids"] + pairs["rejected_ids"]
        masks = pairs["chosen_mask"] + pairs["rejected_mask"]
        input_ids, _ = collate_right(sequences, self._pad_id)
        loss_mask = collate_right(masks, 0)[0].bool().to(device)
        logprobs = self.engine(sequence_logprobs, input_ids.to(device), loss_mask)
        chosen, rejected = logprobs.chunk(2)
        return chosen, rejected


def _preferences(result: DPOLoss) -> Metrics:
    """Means over pairs, under the names that TRL's users know; ties count half."""
    chosen, rejected = result.chosen_rewards, result.rejected_rewards
    right = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
    return {
        "rewards/chosen": float(chosen.mean()),
        "rewards/rejected": float(rejected.mean()),
        "rewards/accuracies": float(right.mean()),
        "rewards/margins": float((chosen - rejected).mean()),
    }
