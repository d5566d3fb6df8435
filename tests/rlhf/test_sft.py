"""Step 1: the loss of the completions, whatever the padding and the micro-batches."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn

from rlhf.config import OptimizerConfig, SFTConfig
from rlhf.data import encode_demonstrations, load_rows
from rlhf.tracking import Tracker
from rlhf.trainers import SFTTrainer


@pytest.fixture
def rows(tokenizer) -> Dataset:
    found = load_rows("synthetic", purpose="demonstrations", max_rows=12)
    return encode_demonstrations(found, tokenizer, max_length=120)


def config(**options: Any) -> SFTConfig:
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_fraction=0.0, max_grad_norm=1e9)
    return SFTConfig(**{"optimizer": optimizer, "batch_size": 12, **options})


def completion_loss(model: nn.Module, rows: Dataset) -> torch.Tensor:
    """Mean over all completion tokens of the batch, by cross-entropy on each row alone."""
    total, count = torch.zeros(()), 0
    for ids, mask in zip(rows["input_ids"], rows["loss_mask"], strict=True):
        logits = model(input_ids=torch.tensor([ids])).logits[0]
        labels = torch.tensor([i if m else -100 for i, m in zip(ids, mask, strict=True)])
        total = total + nn.functional.cross_entropy(logits[:-1], labels[1:], reduction="sum")
        count += int((labels[1:] != -100).sum())
    return total / count


def train(model, tokenizer, rows, folder: Path, console, **options: Any) -> list[dict[str, float]]:
    with Tracker(folder, "sft") as tracker:
        trainer = SFTTrainer(model, tokenizer, config(**options))
        trainer.train(rows, tracker=tracker, console=console)
    return tracker.history


@pytest.mark.parametrize("micro", [12, 5, 1])
def test_loss_and_gradient_are_those_of_all_completion_tokens(
    causal_lm, tokenizer, rows, tmp_path, console, micro: int
) -> None:
    """One global token mean: micro-batches of different lengths weigh by their tokens."""
    model, plain = causal_lm(), causal_lm()
    loss = completion_loss(plain, rows)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(plain.parameters(), 1e9)
    history = train(model, tokenizer, rows, tmp_path, console, micro_batch_size=micro)
    assert len(history) == 1
    assert history[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert history[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_micro_batches_change_no_weight(causal_lm, tokenizer, rows, tmp_path, console) -> None:
    trained = []
    for micro in (12, 5, 1):
        model = causal_lm()
        train(model, tokenizer, rows, tmp_path / str(micro), console, micro_batch_size=micro)
        trained.append(model)
    for other in trained[1:]:
        for found, expected in zip(other.parameters(), trained[0].parameters(), strict=True):
            # Adam divides rounding errors in tiny gradients by eps = 1e-5.
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_prompt_tokens_are_not_trained(causal_lm, tokenizer, rows, tmp_path, console) -> None:
    """Were they, a model that knows the completions alone would still have a loss."""
    history = train(
        causal_lm(), tokenizer, rows.map(lambda row: {"loss_mask": [0] * len(row["loss_mask"])}),
        tmp_path, console,
    )  # fmt: skip
    assert history[0]["loss"] == 0.0
    assert history[0]["grad_norm"] == 0.0


def test_completions_end_with_a_trained_eos(tokenizer, rows) -> None:
    for ids, mask in zip(rows["input_ids"], rows["loss_mask"], strict=True):
        assert ids[-1] == tokenizer.eos_token_id
        assert mask[-1] == 1
        assert mask[0] == 0


def test_evaluation_is_the_mean_per_token(causal_lm, tokenizer, rows) -> None:
    model = causal_lm()
    for micro in (12, 5):
        found = SFTTrainer(model, tokenizer, config(micro_batch_size=micro)).evaluate(rows)
        loss = float(completion_loss(model, rows).detach())
        assert found["eval/loss"] == pytest.approx(loss, rel=1e-5)
        assert found["eval/perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_training_lowers_the_loss(causal_lm, tokenizer, rows, tmp_path, console) -> None:
    history = train(causal_lm(), tokenizer, rows, tmp_path, console, epochs=30)
    assert history[-1]["loss"] < 0.75 * history[0]["loss"]
    lines = [json.loads(line) for line in (tmp_path / "sft.jsonl").read_text().splitlines()]
    assert lines == history
    assert [line["step"] for line in lines] == list(range(1, 31))


def test_dropout_is_on_in_training_and_off_in_evaluation(
    causal_lm, tokenizer, rows, tmp_path, console
) -> None:
    model = causal_lm("opt", dropout=0.5)
    trainer = SFTTrainer(model, tokenizer, config())
    assert trainer.evaluate(rows) == trainer.evaluate(rows)
    losses = [
        train(copy.deepcopy(model), tokenizer, rows, tmp_path, console)[0]["loss"] for _ in range(2)
    ]
    assert losses[0] != losses[1]


def test_the_seed_decides_the_order(causal_lm, tokenizer, rows, tmp_path, console) -> None:
    def losses(seed: int) -> list[float]:
        with Tracker(tmp_path, "sft") as tracker:
            trainer = SFTTrainer(causal_lm(), tokenizer, config(batch_size=2), seed=seed)
            trainer.train(rows, tracker=tracker, console=console)
        return [record["loss"] for record in tracker.history]

    assert losses(0) == losses(0)
    assert losses(0) != losses(1)
