"""Direct preference optimisation: the policy learns from pairs, without a reward model.

The reference is the policy as it comes in; its log-probs are taken once, before the first step, so
no second model is in memory while the policy trains.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from datasets import Dataset
from rich.console import Console
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf import distributed
from rlhf.checkpoint import Checkpoints
from rlhf.config import DPOConfig
from rlhf.data import RowBatches, collate_right
from rlhf.engines import Engine, Engines, PlainEngine, TrainingEngine
from rlhf.losses import DPOLoss, dpo_loss
from rlhf.models import sequence_logprobs
from rlhf.tracking import Tracker
from rlhf.trainers.columns import Columns, micro_batches, pieces
from rlhf.trainers.loop import Metrics, train_epochs


class DPOTrainer:
    """Trains a causal language model on encoded pairs (Preference)."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        config: DPOConfig,
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
        sides = (rows["chosen_ids"], rows["rejected_ids"])
        lengths = [len(a) + len(b) for a, b in zip(*sides, strict=True)]
        batches = RowBatches(len(rows), config.batch_size, lengths=lengths, seed=self._seed)
        steps = len(batches) * config.epochs
        engine = self._engines.training(self._model, config.optimizer, total_steps=steps)
        self.engine = engine
        reference = self.logprobs(rows)
        return train_epochs(
            engine,
            batches,
            lambda indices: self._train_batch(engine, rows[indices], reference[indices]),
            None if heldout is None else self._evaluation(heldout),
            config,
            lengths=lengths,
            tracker=tracker,
            console=console,
            checkpoints=checkpoints,
        )

    def _evaluation(self, rows: Dataset) -> Callable[[], Metrics]:
        reference = self.logprobs(rows)
        return lambda: self.evaluate(rows, reference)

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

    def _train_batch(self, engine: TrainingEngine, batch: Columns, reference: Tensor) -> Metrics:
        count = len(batch["chosen_ids"])
        columns = {**batch, "reference": reference.tolist()}
        sums: Metrics = {}
        for pairs, weight in micro_batches(columns, self._config.micro_batch_size):
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
