"""What SFT, reward model and DPO share: evaluation on the way, and the best weights at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rlhf.config import OptimizerConfig, SFTConfig
from rlhf.data import RowBatches
from rlhf.engines import Engines
from rlhf.tracking import Tracker
from rlhf.trainers.loop import train_epochs

STEPS_AN_EPOCH = 3


class OneWeight(nn.Module):
    """Its loss is the weight itself, so that each optimizer step lowers it by the learning rate."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0]))


def run(folder: Path, console, evaluations: dict[int, float] | None, **options: Any):
    """Train four epochs; `evaluations` says what is measured after each step that measures."""
    model = OneWeight()
    optimizer = OptimizerConfig(
        learning_rate=0.01, schedule="constant", warmup_fraction=0.0, max_grad_norm=1e9
    )
    config = SFTConfig(optimizer=optimizer, epochs=4, **options)
    engine = Engines().training(model, optimizer, total_steps=12)
    weights = [1.0]

    def train_batch(indices: list[int]) -> dict[str, float]:
        assert model.training
        loss = model.weight.sum()
        engine.backward(loss)
        return {"loss": float(loss.detach())}

    def evaluate() -> dict[str, float]:
        model.eval()
        weights.append(float(model.weight.detach()))
        return {"eval/loss": evaluations[len(tracker.history) + 1]}

    with Tracker(folder, "sft") as tracker:
        found = train_epochs(
            engine,
            RowBatches(6, 2),
            train_batch,
            None if evaluations is None else evaluate,
            config,
            lengths=[1] * 6,
            tracker=tracker,
            console=console,
        )
    return model, found, tracker.history, weights


def test_the_best_weights_are_kept(tmp_path: Path, console) -> None:
    losses = {3: 0.9, 6: 0.5, 9: 0.7, 12: 0.6}
    model, found, history, weights = run(tmp_path, console, losses)
    assert found == {"eval/loss": 0.5, "eval/step": 6.0}
    assert float(model.weight.detach()) == weights[2] != weights[4]
    assert {r["step"]: r["eval/loss"] for r in history if "eval/loss" in r} == losses
    assert len(history) == 12
    assert not list(tmp_path.glob(".*"))  # nothing is left of them


def test_the_last_weights_are_kept_where_they_are_best_or_wanted(tmp_path: Path, console) -> None:
    model, found, _, weights = run(tmp_path, console, {3: 0.9, 6: 0.5, 9: 0.7, 12: 0.4})
    assert found == {"eval/loss": 0.4, "eval/step": 12.0}
    assert float(model.weight.detach()) == weights[4]
    model, found, _, weights = run(
        tmp_path, console, {3: 0.9, 6: 0.5, 9: 0.7, 12: 0.6}, keep_best=False
    )
    assert found == {"eval/loss": 0.6, "eval/step": 12.0}
    assert float(model.weight.detach()) == weights[4]


def test_a_loss_that_is_no_number_is_not_the_best(tmp_path: Path, console) -> None:
    nan = float("nan")
    _, found, _, _ = run(tmp_path, console, {3: 0.5, 6: nan, 9: nan, 12: nan})
    assert found["eval/step"] == 3.0


def test_evaluation_every_few_steps(tmp_path: Path, console) -> None:
    losses = {5: 0.9, 10: 0.5, 12: 0.7}
    _, found, history, _ = run(tmp_path, console, losses, eval_steps=5)
    assert [r["step"] for r in history if "eval/loss" in r] == [5, 10, 12]
    assert found["eval/step"] == 10.0


def test_without_held_out_rows_nothing_is_measured(tmp_path: Path, console) -> None:
    model, found, history, _ = run(tmp_path, console, None)
    assert found == {}
    assert not any("eval/loss" in record for record in history)
    assert float(model.weight.detach()) < 0.95


@pytest.mark.parametrize("steps", [0, -3])
def test_bad_eval_steps(steps: int) -> None:
    with pytest.raises(ValueError, match="eval_steps must be positive"):
        SFTConfig(eval_steps=steps)
