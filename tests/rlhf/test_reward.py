"""Step 2: pairs, accuracy, and the normalisation that PPO relies on."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn

from rlhf.config import OptimizerConfig, RewardConfig
from rlhf.data import collate_right, encode_preferences, load_rows
from rlhf.models import load_scorer, save_model, sequence_scores
from rlhf.tracking import Tracker
from rlhf.trainers import RewardTrainer, calibration


@pytest.fixture
def rows(tokenizer) -> Dataset:
    found = load_rows("synthetic", purpose="preferences", max_rows=12)
    return encode_preferences(found, tokenizer, max_length=120)


def config(**options: Any) -> RewardConfig:
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_fraction=0.0, max_grad_norm=1e9)
    return RewardConfig(**{"optimizer": optimizer, "batch_size": 12, **options})


def score(model: nn.Module, sequence: list[int]) -> torch.Tensor:
    """At the last token of a sequence that is alone."""
    hidden = model.base_model(input_ids=torch.tensor([sequence])).last_hidden_state
    return model.score(hidden[0, -1])[0]


def differences(model: nn.Module, rows: Dataset) -> torch.Tensor:
    pairs = zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)
    return torch.stack([score(model, a) - score(model, b) for a, b in pairs])


def train(model, tokenizer, rows, folder: Path, console, **options: Any) -> list[dict[str, float]]:
    with Tracker(folder, "reward") as tracker:
        trainer = RewardTrainer(model, tokenizer, config(**options))
        trainer.train(rows, tracker=tracker, console=console)
    return tracker.history


@pytest.mark.parametrize("micro", [12, 5, 1])
def test_loss_and_gradient_are_the_mean_over_pairs(
    scorer, tokenizer, rows, tmp_path, console, micro: int
) -> None:
    model, plain = scorer(), scorer()
    found = differences(plain, rows)
    loss = sum(math.log1p(math.exp(-float(d))) for d in found.detach()) / len(found)
    torch.nn.functional.softplus(-found).mean().backward()
    norm = nn.utils.clip_grad_norm_(plain.parameters(), 1e9)
    history = train(model, tokenizer, rows, tmp_path, console, micro_batch_size=micro)
    assert history[0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert history[0]["accuracy"] == int((found > 0).sum()) / len(found)
    assert history[0]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.parametrize("micro", [12, 5])
def test_evaluation_by_hand(scorer, tokenizer, rows, micro: int) -> None:
    model = scorer()
    found = differences(model, rows).detach()
    evaluation = RewardTrainer(model, tokenizer, config(micro_batch_size=micro)).evaluate(rows)
    assert evaluation["eval/accuracy"] == pytest.approx(int((found > 0).sum()) / len(found))
    assert evaluation["eval/margin"] == pytest.approx(float(found.mean()), rel=1e-4)
    loss = float(torch.nn.functional.softplus(-found).mean())
    assert evaluation["eval/loss"] == pytest.approx(loss, rel=1e-5)


def test_a_constant_reward_ranks_half_right(scorer, tokenizer, rows) -> None:
    """A tie is a coin toss, not a success."""
    model = scorer()
    torch.nn.init.zeros_(model.score.weight)
    evaluation = RewardTrainer(model, tokenizer, config()).evaluate(rows)
    assert evaluation["eval/accuracy"] == 0.5
    assert evaluation["eval/loss"] == pytest.approx(math.log(2))


def test_training_learns_the_pairs(scorer, tokenizer, rows, tmp_path, console) -> None:
    model = scorer()
    history = train(model, tokenizer, rows, tmp_path, console, epochs=25)
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]
    trainer = RewardTrainer(model, tokenizer, config())
    assert trainer.evaluate(rows)["eval/accuracy"] == 1.0
    swapped = rows.rename_columns({"chosen_ids": "rejected_ids", "rejected_ids": "chosen_ids"})
    assert trainer.evaluate(swapped)["eval/accuracy"] == 0.0


def all_scores(model: nn.Module, sequences: list[list[int]]) -> torch.Tensor:
    with torch.no_grad():
        return sequence_scores(model, *collate_right(sequences, 0))


def test_normalised_scores_have_mean_0_and_std_1(scorer, tokenizer, rows) -> None:
    model, sequences = scorer(), list(rows["chosen_ids"])
    before = all_scores(model, sequences)
    mean, std = before.mean(), before.std(correction=0)
    found = RewardTrainer(model, tokenizer, config(micro_batch_size=5)).normalise(sequences)
    assert found["score_mean"] == pytest.approx(float(mean), rel=1e-4)
    assert found["score_std"] == pytest.approx(float(std), rel=1e-4)
    after = all_scores(model, sequences)
    torch.testing.assert_close(after, (before - mean) / std)


def test_normalising_again_changes_nothing(scorer, tokenizer, rows) -> None:
    model, sequences = scorer(), list(rows["chosen_ids"])
    trainer = RewardTrainer(model, tokenizer, config())
    trainer.normalise(sequences)
    once = all_scores(model, sequences)
    again = trainer.normalise(sequences)
    assert again["score_mean"] == pytest.approx(0.0, abs=1e-5)
    assert again["score_std"] == pytest.approx(1.0, rel=1e-5)
    torch.testing.assert_close(all_scores(model, sequences), once)


def test_normalisation_keeps_the_ranking(scorer, tokenizer, rows) -> None:
    model = scorer()
    trainer = RewardTrainer(model, tokenizer, config())
    before = trainer.evaluate(rows)
    trainer.normalise(list(rows["chosen_ids"]))
    after = trainer.evaluate(rows)
    assert after["eval/accuracy"] == before["eval/accuracy"]


def test_normalisation_survives_saving(scorer, tokenizer, rows, tmp_path: Path) -> None:
    model, sequences = scorer(), list(rows["chosen_ids"])
    RewardTrainer(model, tokenizer, config()).normalise(sequences)
    save_model(model, tokenizer, tmp_path / "reward")
    loaded = load_scorer(str(tmp_path / "reward"), tokenizer, dtype=torch.float32).eval()
    found = all_scores(loaded, sequences)
    assert torch.equal(found, all_scores(model, sequences))
    assert float(found.mean()) == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("count", [1, 2])
def test_normalising_on_too_few_sequences_stays_finite(scorer, tokenizer, rows, count) -> None:
    """One sequence, or equal ones, have no spread to divide by."""
    model = scorer()
    sequences = [rows["chosen_ids"][0]] * count
    RewardTrainer(model, tokenizer, config()).normalise(sequences)
    assert all_scores(model, sequences).tolist() == pytest.approx([0.0] * count, abs=1e-3)
    assert torch.isfinite(model.score.weight).all()
    others = all_scores(model, list(rows["rejected_ids"]))
    assert others.abs().max() < 100


def with_margins(rows: Dataset, margins: list[float]) -> Dataset:
    return rows.remove_columns("margin").add_column("margin", margins)


@pytest.mark.parametrize("micro", [12, 5])
def test_margins_and_centring_enter_the_loss(
    scorer, tokenizer, rows, tmp_path, console, micro: int
) -> None:
    margins = [0.25 * i for i in range(12)]
    model, plain = scorer(), scorer()
    found = differences(plain, rows)
    pairs = zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)
    sums = torch.stack([score(plain, a) + score(plain, b) for a, b in pairs])
    loss = (nn.functional.softplus(torch.tensor(margins) - found) + 0.3 * sums.square()).mean()
    history = train(
        model, tokenizer, with_margins(rows, margins), tmp_path, console, micro_batch_size=micro,
        centring_coef=0.3,
    )  # fmt: skip
    assert history[0]["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert history[0]["margin"] == pytest.approx(float(found.detach().mean()), rel=1e-4)


def test_a_larger_margin_drives_scores_further_apart(scorer, tokenizer, rows, tmp_path, console):
    found = []
    for margin in (0.0, 5.0):
        model = scorer()
        train(model, tokenizer, with_margins(rows, [margin] * 12), tmp_path, console, epochs=15)
        found.append(RewardTrainer(model, tokenizer, config()).evaluate(rows)["eval/margin"])
    assert found[1] > found[0] + 0.5


def test_centring_keeps_scores_about_zero(scorer, tokenizer, rows, tmp_path, console) -> None:
    found = []
    for coef in (0.0, 0.1):
        model = scorer()
        with torch.no_grad():
            model.score.weight.mul_(3)
        train(model, tokenizer, rows, tmp_path, console, epochs=15, centring_coef=coef)
        levels = all_scores(model, list(rows["chosen_ids"]) + list(rows["rejected_ids"]))
        found.append(float(levels.mean().abs()))
    assert found[1] < 0.5 * found[0]


def test_calibration_by_hand() -> None:
    """Nine pairs of which the model is 0.55 sure, one in three wrong; ten at 0.95, one wrong."""
    little, much = math.log(0.55 / 0.45), math.log(0.95 / 0.05)
    found = torch.tensor([little] * 6 + [-little] * 3 + [much] * 9 + [-much])
    (low, low_right, low_pairs), (high, high_right, high_pairs) = calibration(found)
    assert (low_pairs, high_pairs) == (9, 10)
    assert (low, low_right) == (pytest.approx(0.55), pytest.approx(6 / 9))
    assert (high, high_right) == (pytest.approx(0.95), pytest.approx(0.9))
    assert calibration(torch.zeros(4)) == [(0.5, 0.5, 4)]
    assert calibration(torch.tensor([100.0])) == [(1.0, 1.0, 1)]
