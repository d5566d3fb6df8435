"""DPO: the loss of whole completions, the reference of before, and what it learns."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn

from rlhf.config import DPOConfig, LoraConfig, OptimizerConfig
from rlhf.data import encode_preferences, load_rows
from rlhf.models import add_adapters
from rlhf.tracking import Tracker
from rlhf.trainers import DPOTrainer


@pytest.fixture
def rows(tokenizer) -> Dataset:
    found = load_rows("synthetic", purpose="preferences", max_rows=12)
    return encode_preferences(found, tokenizer, max_length=120)


def config(**options: Any) -> DPOConfig:
    optimizer = OptimizerConfig(learning_rate=1e-3, warmup_fraction=0.0, max_grad_norm=1e9)
    return DPOConfig(**{"optimizer": optimizer, "batch_size": 12, **options})


def plain_logprob(model: nn.Module, ids: list[int], mask: list[int]) -> torch.Tensor:
    """Of one completion, by full logits."""
    logp = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(logp[i - 1, ids[i]] for i in range(1, len(ids)) if mask[i])


def plain_logprobs(model: nn.Module, rows: Dataset) -> torch.Tensor:
    sides = [
        [plain_logprob(model, row[f"{side}_ids"], row[f"{side}_mask"]) for row in rows]
        for side in ("chosen", "rejected")
    ]
    return torch.stack([torch.stack(side) for side in sides], 1)  # (n, 2)


def train(model, tokenizer, rows, folder: Path, console, **options: Any) -> list[dict[str, float]]:
    with Tracker(folder, "dpo") as tracker:
        DPOTrainer(model, tokenizer, config(**options)).train(
            rows, tracker=tracker, console=console
        )
    return tracker.history


def test_log_probs_are_those_of_the_completions(causal_lm, tokenizer, rows) -> None:
    model = causal_lm()
    trainer = DPOTrainer(model, tokenizer, config(micro_batch_size=5))
    expected = plain_logprobs(model, rows).detach()
    torch.testing.assert_close(trainer.logprobs(rows), expected, rtol=1e-5, atol=1e-4)


def test_masks_cover_the_completion_and_its_end(tokenizer, rows) -> None:
    for row in rows:
        for side in ("chosen", "rejected"):
            ids, mask = row[f"{side}_ids"], row[f"{side}_mask"]
            start = mask.index(1)
            assert mask == [0] * start + [1] * (len(ids) - start)
            assert ids[:start] == row["chosen_ids"][:start]
            assert ids[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("micro", [12, 5, 1])
@pytest.mark.parametrize("options", [{}, {"loss": "ipo", "beta": 0.02}], ids=["sigmoid", "ipo"])
def test_loss_and_gradient_are_the_mean_over_pairs(
    causal_lm, tokenizer, rows, tmp_path, console, micro: int, options
) -> None:
    """From a policy that has moved away from its reference, on the second step."""
    model, plain = causal_lm(), causal_lm()
    reference = plain_logprobs(plain, rows).detach()
    history = train(model, tokenizer, rows, tmp_path, console, micro_batch_size=micro, epochs=2,
                    **options)  # fmt: skip
    moved = causal_lm()
    train(moved, tokenizer, rows, tmp_path / "one", console, micro_batch_size=12,
          optimizer=OptimizerConfig(learning_rate=1e-3, warmup_fraction=0.0, max_grad_norm=1e9,
                                    schedule="constant"), **options)  # fmt: skip
    h = (plain_logprobs(moved, rows) - reference) @ torch.tensor([1.0, -1.0])
    beta = options.get("beta", 0.1)
    losses = (h - 0.5 / beta).square() if options else nn.functional.softplus(-beta * h)
    losses.mean().backward()
    norm = nn.utils.clip_grad_norm_(moved.parameters(), 1e9)
    start = (0.5 / beta) ** 2 if options else math.log(2)
    assert history[0]["loss"] == pytest.approx(start, rel=1e-4)
    assert history[1]["loss"] == pytest.approx(float(losses.mean().detach()), rel=1e-3)
    assert history[1]["grad_norm"] == pytest.approx(float(norm), rel=1e-2)
    margins = beta * h.detach()
    assert history[1]["rewards/margins"] == pytest.approx(float(margins.mean()), rel=1e-3)
    assert history[1]["rewards/accuracies"] == pytest.approx(float((margins > 0).float().mean()))


def test_the_first_step_starts_at_the_reference(causal_lm, tokenizer, rows, tmp_path, console):
    first = train(causal_lm(), tokenizer, rows, tmp_path, console)[0]
    assert first["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert first["rewards/accuracies"] == pytest.approx(0.5, abs=0.5)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        assert first[name] == pytest.approx(0.0, abs=1e-4)


def test_training_learns_the_pairs(causal_lm, tokenizer, rows, tmp_path, console) -> None:
    model = causal_lm()
    trainer = DPOTrainer(model, tokenizer, config())
    reference = trainer.logprobs(rows)
    history = train(model, tokenizer, rows, tmp_path, console, epochs=12)
    found = DPOTrainer(model, tokenizer, config()).evaluate(rows, reference)
    assert found["eval/rewards/accuracies"] == 1.0
    assert found["eval/loss"] < 0.5 * math.log(2)
    assert found["eval/rewards/margins"] == pytest.approx(
        found["eval/rewards/chosen"] - found["eval/rewards/rejected"], rel=1e-4
    )
    lines = [json.loads(line) for line in (tmp_path / "dpo.jsonl").read_text().splitlines()]
    assert lines == history


def test_with_adapters_the_reference_is_the_model_under_them(
    causal_lm, tokenizer, rows, tmp_path, console
) -> None:
    model, plain = add_adapters(causal_lm(), LoraConfig(r=4)), causal_lm()
    before = {name: p.clone() for name, p in model.named_parameters() if ".lora_" not in name}
    history = train(model, tokenizer, rows, tmp_path, console, epochs=8)
    assert history[0]["loss"] == pytest.approx(math.log(2), rel=1e-5)
    assert history[-1]["loss"] < 0.6
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
    assert not torch.allclose(plain_logprobs(model, rows), plain_logprobs(plain, rows))


def test_smoothed_labels_hold_the_margin_back(causal_lm, tokenizer, rows, tmp_path, console):
    margins = [
        train(causal_lm(), tokenizer, rows, tmp_path, console, epochs=20, label_smoothing=s)[-1][
            "rewards/margins"
        ]
        for s in (0.0, 0.3)
    ]
    assert margins[1] < 0.7 * margins[0]
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 0\.5\)"):
        config(label_smoothing=0.5)
