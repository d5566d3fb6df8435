"""The three steps on the synthetic set really learn, at a tenth of the demo's size.

Measured over seeds 0 to 4, with 128 held-out prompts: reward accuracy 0.92 to 0.96; true quality
0.20 to 0.24 before PPO and 0.41 to 0.50 after, up by 0.17 to 0.30; reward-model score up by 1.3 to
1.7; KL from SFT 6.6 to 13.2 nats a response; 17 s of one core. The standard error of a rise is
about 0.03. Without learning (learning rate 1e-9) quality, score and KL do not move at all, since
both evaluations draw with the same seed, and a coin ranks half the pairs right.
"""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
from rich.console import Console

from rlhf.config import (
    DataConfig,
    DPOConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    RewardConfig,
    RunConfig,
    SFTConfig,
)
from rlhf.evaluation import RunReport
from rlhf.pipeline import Pipeline

VOCABULARY = 640


def data(rows: int, max_length: int) -> DataConfig:
    return DataConfig(rows=rows, heldout_rows=200, max_length=max_length)


def configuration(folder: Path) -> RunConfig:
    return RunConfig(
        output_dir=str(folder),
        model=ModelConfig(
            init={
                "model_type": "llama", "hidden_size": 96, "intermediate_size": 240,
                "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
                "max_position_embeddings": 160, "tie_word_embeddings": True,
            },
            vocab_size=VOCABULARY,
        ),
        sft=SFTConfig(
            data=data(4000, 96), optimizer=OptimizerConfig(learning_rate=3e-3), epochs=2,
            batch_size=24, micro_batch_size=24,
        ),
        reward=RewardConfig(data=data(2500, 96), optimizer=OptimizerConfig(learning_rate=1e-3)),
        ppo=PPOConfig(
            data=data(2000, 64), iterations=30, batch_size=64, mini_batches=2, micro_batch_size=64,
            max_new_tokens=28, kl_coef=0.02, actor_optimizer=OptimizerConfig(learning_rate=2e-3),
            critic_optimizer=OptimizerConfig(learning_rate=2e-3),
        ),
        dpo=DPOConfig(
            data=data(2500, 96), optimizer=OptimizerConfig(learning_rate=3e-4), beta=0.1,
            batch_size=32, micro_batch_size=32, max_new_tokens=28,
        ),
        evaluation=EvaluationConfig(
            prompts=128, metric="rlhf.data.synthetic:quality", compare_hf_generate=False
        ),
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("learning")


@pytest.fixture(scope="module")
def report(folder: Path) -> RunReport:
    return Pipeline(configuration(folder), Console(file=io.StringIO())).run()


def test_sft_learns_the_language(report: RunReport) -> None:
    """Of a uniform guess's log(640) = 6.5 nats a token, 1.3 are left."""
    assert report.sft["eval/loss"] < 0.35 * math.log(VOCABULARY)


def test_the_reward_model_ranks_held_out_pairs(report: RunReport) -> None:
    assert report.reward["eval/accuracy"] >= 0.85


def test_ppo_raises_the_true_quality(report: RunReport) -> None:
    """Which no model judges, on prompts that no step has seen."""
    assert report.after.quality >= report.before.quality + 0.1


def test_ppo_raises_the_reward_within_a_bounded_kl(report: RunReport) -> None:
    assert abs(report.before.score) < 0.5  # normalised on demonstrations
    assert report.after.score > report.before.score + 0.8
    assert 1.0 < report.after.kl < 25.0


def test_responses_end_by_themselves(report: RunReport) -> None:
    assert report.after.ended > 0.95


def test_dpo_raises_the_true_quality_without_a_reward_model(
    report: RunReport, folder: Path
) -> None:
    """From the same SFT model, by the pairs alone."""
    pipeline = Pipeline(configuration(folder), Console(file=io.StringIO()))
    pipeline.dpo()
    found = pipeline.report
    assert found.dpo["eval/rewards/accuracies"] >= 0.8
    assert found.before.quality == pytest.approx(report.before.quality, abs=1e-6)
    assert found.after.quality >= found.before.quality + 0.1
    assert 1.0 < found.after.kl < 25.0


def test_rollout_and_training_agree_to_the_end(report: RunReport, folder: Path) -> None:
    """After sixty optimizer steps the engine still reads the weights that train."""
    history = [json.loads(line) for line in (folder / "ppo.jsonl").read_text().splitlines()]
    assert len(history) == 30
    assert max(record["sampling/logp_difference/max"] for record in history) < 1e-4
    assert all(record["val/ratio"] == pytest.approx(1.0, abs=0.1) for record in history)
