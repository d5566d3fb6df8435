"""Step 2, the reward model: which of two answers is better, read at the last real token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from datasets import Dataset
from torch import Tensor, nn

from rlhf import distributed
from rlhf.config import RewardConfig
from rlhf.data import collate_right
from rlhf.engines import TrainingEngine
from rlhf.losses import preference_loss
from rlhf.models import sequence_scores
from rlhf.trainers.columns import Columns, micro_batches, pieces
from rlhf.trainers.loop import Metrics
from rlhf.trainers.supervised import SupervisedTrainer

CALIBRATION_BINS = 10
MIN_SPREAD = 1e-4  # of scores, in nats; less is rounding


class RewardTrainer(SupervisedTrainer[RewardConfig]):
    """Trains a one-label classifier on encoded pairs (Preference)."""

    role = "critic"

    def evaluate(self, rows: Dataset) -> Metrics:
        """Loss per pair, without the margins of the data and the centring; share of pairs ranked
        right (ties count half); mean and standard deviation of score differences."""
        difference = self.differences(rows)
        loss = preference_loss(difference, torch.zeros_like(difference))
        return {
            "eval/loss": float(loss) / len(difference),
            "eval/accuracy": float(_right(difference).mean()),
            "eval/margin": float(difference.mean()),
            "eval/margin_std": float(difference.std(correction=0)),
        }

    @torch.no_grad()
    def differences(self, rows: Dataset) -> Tensor:
        """Chosen less rejected score of every pair, (n,) fp32; ranks have them in another order."""
        self._model.eval()
        found = []
        for piece in pieces(rows):
            for pairs, weight in micro_batches(piece, self._config.micro_batch_size):
                chosen, rejected = self._pair_scores(pairs)
                found.append((chosen - rejected)[: len(chosen) if weight else 0])
        return distributed.gather_rows({"difference": torch.cat(found)})["difference"]

    def normalise(self, sequences: list[list[int]]) -> dict[str, float]:
        """Shift and scale so that these sequences score mean 0 and standard deviation 1.

        The scale goes into the score head, the mean into the config as `score_mean`. Scores without
        spread, such as that of a single sequence, are only shifted.
        """
        self._model.eval()
        scores = []
        with torch.no_grad():
            for batch, weight in micro_batches({"ids": sequences}, self._config.micro_batch_size):
                found = self._scores(batch["ids"])
                scores.append(found[: len(found) if weight else 0])
            found = distributed.gather_rows({"scores": torch.cat(scores)})["scores"]
            mean, std = float(found.mean()), float(found.std(correction=0))
            scale = std if std > MIN_SPREAD else 1.0
            head: nn.Parameter = self._model.score.weight  # type: ignore[union-attr, assignment]
            with self.engine.editing([head]):
                head.div_(scale)
        config = self._model.config
        config.score_mean = (mean + getattr(config, "score_mean", 0.0)) / scale  # type: ignore[union-attr]
        return {"score_mean": mean, "score_std": std}

    def _evaluation_of(self, heldout: Dataset) -> Callable[[], Metrics]:
        return lambda: self.evaluate(heldout)

    def _train_batch(self, engine: TrainingEngine, batch: Columns) -> Metrics:
        count = len(batch["chosen_ids"])
        sums = [0.0, 0.0, 0.0]  # loss, pairs ranked right, score differences
        for pairs, weight in micro_batches(batch, self._config.micro_batch_size):
            chosen, rejected = self._pair_scores(pairs)
            margin = torch.tensor(pairs.get("margin", 0.0), device=chosen.device)
            loss = preference_loss(
                chosen,
                rejected,
                margin,
                centring_coef=self._config.centring_coef,
            )
            engine.backward(loss * (weight / count))
            right, difference = (chosen > rejected).sum(), (chosen - rejected).detach().sum()
            for i, value in enumerate((loss.detach(), right, difference)):
                sums[i] += weight * float(value)
        loss_sum, right_sum, difference_sum = distributed.total(*sums)
        return {
            "loss": loss_sum / count,
            "accuracy": right_sum / count,
            "margin": difference_sum / count,
        }

    def _pair_scores(self, pairs: Columns) -> tuple[Tensor, Tensor]:
        """(B,) and (B,), from one forward over both sides."""
        scores = self._scores(pairs["chosen_ids"] + pairs["rejected_ids"])
        chosen, rejected = scores.chunk(2)
        return chosen, rejected

    def _scores(self, sequences: list[list[int]]) -> Tensor:
        device = next(self._model.parameters()).device
        input_ids, lengths = collate_right(sequences, self._pad_id)
        return self.engine(sequence_scores, input_ids.to(device), lengths.to(device))


def calibration(differences: Tensor) -> list[tuple[float, float, int]]:
    """How often the model is right when it is how sure, from score differences (n,) of pairs.

    Its probability that the higher score is of the better answer is sigmoid(|difference|). Returns
    mean probability, share that is right (ties count half) and number of pairs, for each tenth of
    [0.5, 1] that has pairs.
    """
    sure = differences.abs().sigmoid()
    bins = ((sure - 0.5) * 2 * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    right = _right(differences)
    found = []
    for place in bins.unique().tolist():
        inside = bins == place
        found.append((float(sure[inside].mean()), float(right[inside].mean()), int(inside.sum())))
    return found


def _right(differences: Tensor) -> Tensor:
    """1 where a pair is ranked right, 0.5 for a tie."""
    return (differences > 0).float() + 0.5 * (differences == 0).float()
