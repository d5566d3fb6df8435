"""No step ever has all the logits: every allocation of an iteration is watched."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from rlhf.config import DPOConfig, PPOConfig, RewardConfig, SFTConfig
from rlhf.rewards import Reward
from rlhf.tracking import Tracker
from rlhf.trainers import DPOTrainer, PPOTrainer, RewardTrainer, RLHFEngine, SFTTrainer

ROWS, PROMPT, RESPONSE, VOCABULARY = 16, 16, 48, 16384
ALL_LOGITS = ROWS * RESPONSE * VOCABULARY * 4  # bytes of (B, T, V) in fp32: 50 MB


def largest_allocation(run: Callable[[], object]) -> int:
    """Bytes of the largest piece of memory that torch's allocator was asked for."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    events = recorded.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.fixture
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, VOCABULARY, (ROWS, PROMPT), generator=generator).tolist()


def test_the_plain_way_is_caught(causal_lm, prompts) -> None:
    """Padded full logits, as most trainers have them."""
    model = causal_lm(vocab_size=VOCABULARY)
    ids = torch.randint(3, VOCABULARY, (ROWS, RESPONSE))
    assert largest_allocation(lambda: model(input_ids=ids).logits.log_softmax(-1)) >= ALL_LOGITS


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_reinforcement_learning(causal_lm, scorer, tokenizer, prompts, algorithm: str) -> None:
    """Rollout, scoring with reward model and reference, updates, entropy and KL in the loss."""
    actor = causal_lm(vocab_size=VOCABULARY)
    actor.generation_config.eos_token_id = []
    options: dict[str, Any] = {"old_logprobs": "recompute", "entropy_coef": 0.01}
    critic = scorer(vocab_size=VOCABULARY)
    count = ROWS
    if algorithm == "grpo":
        options |= {"algorithm": "grpo", "samples_per_prompt": 4}
        count, critic = ROWS // 4, None
    config = PPOConfig(max_new_tokens=RESPONSE, batch_size=count, **options)
    reward = Reward(model=scorer(seed=2, vocab_size=VOCABULARY))
    trainer = PPOTrainer(RLHFEngine(actor, critic, reward, tokenizer), config)

    def iteration() -> None:
        experience = trainer.generate_experience(prompts[:count])
        assert int(experience.response_lengths.sum()) == ROWS * RESPONSE
        trainer.train_rlhf(experience)

    assert largest_allocation(iteration) < ALL_LOGITS / 8


def test_sft(causal_lm, tokenizer, prompts, tmp_path: Path) -> None:
    rows = [prompt * 4 for prompt in prompts]
    data = Dataset.from_dict({"input_ids": rows, "loss_mask": [[1] * len(row) for row in rows]})
    trainer = SFTTrainer(causal_lm(vocab_size=VOCABULARY), tokenizer, SFTConfig(batch_size=ROWS))

    def train() -> None:
        with Tracker(tmp_path, "sft") as tracker:
            trainer.train(data, tracker=tracker, console=Console(file=io.StringIO()))

    assert largest_allocation(train) < ALL_LOGITS / 8


def test_reward_model(scorer, tokenizer, prompts, tmp_path: Path) -> None:
    columns = {"chosen_ids": [p * 4 for p in prompts], "rejected_ids": [p * 3 for p in prompts]}
    model = scorer(vocab_size=VOCABULARY)
    trainer = RewardTrainer(model, tokenizer, RewardConfig(batch_size=ROWS))

    def train() -> None:
        with Tracker(tmp_path, "reward") as tracker:
            trainer.train(
                Dataset.from_dict(columns), tracker=tracker, console=Console(file=io.StringIO())
            )

    assert largest_allocation(train) < ALL_LOGITS / 8


def test_dpo(causal_lm, tokenizer, prompts, tmp_path: Path) -> None:
    """With the log-probs of the reference."""
    chosen, rejected = [p * 4 for p in prompts], [p * 3 for p in prompts]
    columns = {
        "chosen_ids": chosen, "chosen_mask": [[0] * PROMPT + [1] * (3 * PROMPT)] * ROWS,
        "rejected_ids": rejected, "rejected_mask": [[0] * PROMPT + [1] * (2 * PROMPT)] * ROWS,
    }  # fmt: skip
    trainer = DPOTrainer(causal_lm(vocab_size=VOCABULARY), tokenizer, DPOConfig(batch_size=ROWS))

    def train() -> None:
        with Tracker(tmp_path, "dpo") as tracker:
            trainer.train(
                Dataset.from_dict(columns), tracker=tracker, console=Console(file=io.StringIO())
            )

    assert largest_allocation(train) < ALL_LOGITS / 8
