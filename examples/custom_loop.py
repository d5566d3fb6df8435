"""The paper's loop in fifteen lines, with a reward and an advantage of one's own.

    python examples/custom_loop.py            # a small random model, seconds on a CPU

The reward wants many vowels; the advantage is the reward's rank among the responses to a prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhf import PPOTrainer, RLHFEngine
from rlhf.config import OptimizerConfig, PPOConfig
from rlhf.data import train_tokenizer
from rlhf.models import build_causal_lm
from rlhf.rewards import Reward

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip


def vowels(prompts: list[str], completions: list[str]) -> list[float]:
    """The share of vowels in each completion."""
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]


def rank(rewards: Tensor, mask: Tensor, groups: Tensor) -> Tensor:
    """From -1 for the worst response to a prompt to 1 for the best, on each token: (B, T)."""
    totals = rewards.sum(1)  # (B,)
    same = groups.unsqueeze(0) == groups.unsqueeze(1)  # (B, B)
    worse = (same & (totals.unsqueeze(1) > totals.unsqueeze(0))).sum(1)
    better = (same & (totals.unsqueeze(1) < totals.unsqueeze(0))).sum(1)
    return ((worse - better) / (same.sum(1) - 1).clamp(min=1)).unsqueeze(1) * mask


def main(iterations: int = 40) -> list[float]:
    """Train, and return the mean score of each iteration."""
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["say a word: banana, tree, audio, rhythm"], vocab_size=270)
    actor = build_causal_lm(LLAMA, tokenizer, dtype=torch.float32)
    config = PPOConfig(
        algorithm="grpo", samples_per_prompt=8, batch_size=4, iterations=iterations,
        max_new_tokens=16, kl_coef=0.01, missing_eos_penalty=0.0,
        actor_optimizer=OptimizerConfig(learning_rate=3e-3),
    )  # fmt: skip
    prompts = [tokenizer(text)["input_ids"] for text in ("say", "a word", "tree", "audio")]
    trainer = PPOTrainer(
        RLHFEngine(actor, None, Reward([vowels]), tokenizer), config, advantage=rank
    )
    scores = []
    for iteration in range(iterations):
        experience = trainer.generate_experience(prompts)
        trainer.train_rlhf(experience)
        scores.append(trainer.metrics["objective/scores"])
        print(f"{iteration:3d}  score {scores[-1]:.3f}  KL {trainer.metrics['objective/kl']:.2f}")
    return scores


if __name__ == "__main__":
    main()
