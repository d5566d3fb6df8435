"""TRL's trainers, unmodified, on an accelerated model: the same training, rolled out by the engine.

With top_k=1 both loops must pick the same tokens, so losses are comparable step by step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

import hybrid_engine as he
from rlhf.data import train_tokenizer

trl = pytest.importorskip("trl")

PROMPTS = [f"add {a} and {b}" for a in range(6) for b in range(6)]
STEPS = 3
TRAINERS = {"GRPO": ("GRPOTrainer", "GRPOConfig"), "RLOO": ("RLOOTrainer", "RLOOConfig")}


def count_digits(completions: list[str], **columns: Any) -> list[float]:
    return [float(sum(c.isdigit() for c in text)) for text in completions]


def train(name: str, folder: Path, *, accelerated: bool) -> tuple[list[float], he.Acceleration]:
    """The losses of a short run, and the engine's state after it."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(PROMPTS, vocab_size=300)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)  # RLOO loads its reference by name
    model: Any = LlamaForCausalLM.from_pretrained(folder)
    if accelerated:
        he.accelerate(model)
    trainer_class, config_class = (getattr(trl, part) for part in TRAINERS[name])
    options = config_class(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=4, num_generations=2,
        max_completion_length=12, top_k=1, learning_rate=1e-2, report_to="none", use_cpu=True,
        bf16=False, logging_steps=1, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = trainer_class(
        model=model, processing_class=tokenizer, args=options, reward_funcs=count_digits,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
    )  # fmt: skip
    trainer.train()
    logs = [log for log in trainer.state.log_history if "completions/mean_length" in log]
    figures = [log[key] for log in logs for key in ("loss", "reward", "completions/mean_length")]
    return figures, he.acceleration(model)  # type: ignore[return-value]


@pytest.mark.parametrize("name", TRAINERS)
def test_training_is_the_same_and_the_engine_rolls_out(name: str, tmp_path: Path) -> None:
    plain, state = train(name, tmp_path / "plain", accelerated=False)
    assert state is None
    accelerated, state = train(name, tmp_path / "accelerated", accelerated=True)
    assert state.served == STEPS
    assert state.fallbacks == {}
    assert len(plain) == 3 * STEPS
    assert accelerated == pytest.approx(plain, abs=1e-4)
