"""200 PPO iterations of 4 epochs on real data: every metric stays finite, every weight too."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from rlhf.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    OptimizerConfig,
    PPOConfig,
    RewardConfig,
    RunConfig,
    SFTConfig,
)
from rlhf.data import load_tokenizer
from rlhf.models import load_causal_lm
from rlhf.pipeline import Pipeline

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip


def pipeline(folder: Path, data: str, console: Console, **ppo: Any) -> Pipeline:
    def source(max_length: int) -> DataConfig:
        return DataConfig(name=str(DATA / data), max_length=max_length, heldout_rows=32)

    fast = OptimizerConfig(learning_rate=1e-3)
    return Pipeline(
        RunConfig(
            output_dir=str(folder),
            model=ModelConfig(init=LLAMA, vocab_size=512),
            sft=SFTConfig(data=source(256), optimizer=OptimizerConfig(learning_rate=2e-3)),
            reward=RewardConfig(data=source(256), optimizer=fast),
            ppo=PPOConfig(
                data=source(160), iterations=200, epochs=4, batch_size=8, mini_batches=2,
                max_new_tokens=24, actor_optimizer=fast, critic_optimizer=fast, **ppo,
            ),
            evaluation=EvaluationConfig(prompts=16, compare_hf_generate=False),
        ),
        console,
    )  # fmt: skip


def assert_finite(folder: Path) -> None:
    history = [json.loads(line) for line in (folder / "ppo.jsonl").read_text().splitlines()]
    assert len(history) == 200
    for record in history:
        assert all(math.isfinite(value) for value in record.values()), record
    assert max(record["sampling/logp_difference/max"] for record in history) < 1e-3
    tokenizer = load_tokenizer(str(folder / "actor"))
    actor = load_causal_lm(str(folder / "actor"), tokenizer, dtype=torch.float32)
    assert all(p.isfinite().all() for p in actor.parameters())


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the real data in ../shared/data")
def test_hh_rlhf_with_a_reward_model(tmp_path: Path, console: Console) -> None:
    found = pipeline(tmp_path, "hh_rlhf", console)
    found.sft()
    found.reward()
    found.ppo()
    assert_finite(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="needs the real data in ../shared/data")
@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_gsm8k_with_its_exact_answer(tmp_path: Path, console: Console, algorithm: Any) -> None:
    found = pipeline(
        tmp_path, "gsm8k", console, algorithm=algorithm, samples_per_prompt=2,
        reward_functions=["rlhf.rewards.gsm8k:exact_answer"],
    )  # fmt: skip
    found.sft()
    found.ppo()
    assert_finite(tmp_path)
