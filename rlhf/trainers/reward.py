"""Step 2, the reward model: which of two answers is better, read at the last real token."""

from __future__ import annotations

from itertools import islice

import torch
from datasets import Dataset
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf import distributed
from rlhf.checkpoint import Checkpoints
from rlhf.config import RewardConfig
from rlhf.data import RowBatches, collate_right
from rlhf.engines import Engine, Engines, PlainEngine, TrainingEngine
from rlhf.losses import preference_loss
from rlhf.models import sequence_scores
from rlhf.tracking import ProgressBar, Tracker
from rlhf.trainers.columns import Columns, micro_batches

MIN_SPREAD = 1e-4  # of scores, in nats; less is rounding


class RewardTrainer:
    """Trains a one-label classifier on encoded pairs (chosen_ids, rejected_ids)."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        config: RewardConfig,
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
        checkpoints: Checkpoints | None = None,
    ) -> None:
        config = self._config
        chosen, rejected = rows["chosen_ids"], rows["rejected_ids"]
        lengths = [len(a) + len(b) for a, b in zip(chosen, rejected, strict=True)]
        batches = RowBatches(len(rows), config.batch_size, lengths=lengths, seed=self._seed)
        steps = len(batches) * config.epochs
        engine = self._engines.training(
            self._model, config.optimizer, total_steps=steps, role="critic"
        )
        self.engine = engine
        done = checkpoints.begin({"model": engine}, {"data": batches}) if checkpoints else 0
        tracker.rewind(done)
        self._model.train()
        with ProgressBar("reward", steps, console, done=done) as bar:
            for step, indices in enumerate(islice(batches, steps - done), done + 1):
                loss, accuracy = self._train_batch(engine, rows[indices])
                info = engine.step()
                tracker.log(
                    step,
                    {
                        "loss": loss,
                        "accuracy": accuracy,
                        "lr": info.learning_rate,
                        "grad_norm": info.grad_norm,
                    },
                )
                bar.advance(tokens=sum(lengths[i] for i in indices), loss=loss, accuracy=accuracy)
                if checkpoints:
                    checkpoints.after(step, last=steps)

    def evaluate(self, rows: Dataset) -> dict[str, float]:
        """Loss per pair, share of pairs ranked right (ties count half), mean margin."""
        self._model.eval()
        margins = []
        with torch.no_grad():
            for pairs, weight in micro_batches(rows[:], self._config.micro_batch_size):
                chosen, rejected = self._pair_scores(pairs)
                margins.append((chosen - rejected)[: len(chosen) if weight else 0])
        margin = distributed.gather_rows({"margin": torch.cat(margins)})["margin"]
        right = (margin > 0).float() + 0.5 * (margin == 0).float()
        return {
            "eval/loss": float(preference_loss(margin, torch.zeros_like(margin))) / len(margin),
            "eval/accuracy": float(right.mean()),
            "eval/margin": float(margin.mean()),
        }

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

    def _train_batch(self, engine: TrainingEngine, batch: Columns) -> tuple[float, float]:
        count = len(batch["chosen_ids"])
        total, right = 0.0, 0.0
        for pairs, weight in micro_batches(batch, self._config.micro_batch_size):
            chosen, rejected = self._pair_scores(pairs)
            loss = preference_loss(chosen, rejected) * (weight / count)
            engine.backward(loss)
            total += float(loss.detach())
            right += weight * float((chosen > rejected).sum())
        total, right = distributed.total(total, right)
        return total, right / count

    def _pair_scores(self, pairs: Columns) -> tuple[Tensor, Tensor]:
        """(B,) and (B,), from one forward over both sides."""
        scores = self._scores(pairs["chosen_ids"] + pairs["rejected_ids"])
        chosen, rejected = scores.chunk(2)
        return chosen, rejected

    def _scores(self, sequences: list[list[int]]) -> Tensor:
        device = next(self._model.parameters()).device
        input_ids, lengths = collate_right(sequences, self._pad_id)
        return self.engine(sequence_scores, input_ids.to(device), lengths.to(device))
