"""TRL 1.12's experimental PPOTrainer, the last one, on an accelerated policy. `make test-trl-ppo`.

It reads the scores of generation, and offers no greedy rollouts. So the accelerated run's tokens
and scores are given to a second, plain run, which must train the same; a third, plain run generates
for itself, to be timed. Needs an environment of its own, because TRL 1.13 dropped the trainer.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

import hybrid_engine as he
from rlhf.data import train_tokenizer

PROMPTS = [f"add {a} and {b}" for a in range(8) for b in range(8)]
STEPS = 3
FIGURES = ("objective/kl", "objective/scores", "loss/policy_avg", "loss/value_avg", "val/ratio")
generate = ppo_trainer.batch_generation


@dataclass
class Run:
    figures: list[float] = field(default_factory=list)  # FIGURES of each step
    rollouts: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # processor time of each rollout
    state: he.Acceleration | None = None


def train(folder: Path, *, accelerated: bool, replayed: list[Any] | None = None) -> Run:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(PROMPTS, vocab_size=300)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128, num_labels=1,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    policy, reference = LlamaForCausalLM(config), LlamaForCausalLM(config)
    reward, value = (LlamaForSequenceClassification(config) for _ in range(2))
    run = Run()
    if accelerated:
        he.accelerate(policy)
        run.state = he.acceleration(policy)

    def recorded(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        start = time.process_time()
        result = replayed[len(run.rollouts)] if replayed else generate(*args, **kwargs)
        run.seconds.append(time.process_time() - start)
        run.rollouts.append(tuple(tensor.clone() for tensor in result))
        return result

    ppo_trainer.batch_generation = recorded
    rows = Dataset.from_dict({"input_ids": [tokenizer(text)["input_ids"] for text in PROMPTS]})
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(folder), per_device_train_batch_size=8, num_mini_batches=1,
            total_episodes=8 * STEPS, response_length=24, num_sample_generations=0,
            local_rollout_forward_batch_size=8, learning_rate=1e-3, report_to="none", use_cpu=True,
            bf16=False, logging_steps=1, save_strategy="no", disable_tqdm=True, num_ppo_epochs=1,
        ),
        processing_class=tokenizer, model=policy, ref_model=reference, reward_model=reward,
        value_model=value, train_dataset=rows, eval_dataset=rows,
    )  # fmt: skip
    trainer.train()
    logs = [log for log in trainer.state.log_history if FIGURES[0] in log]
    run.figures = [log[key] for log in logs for key in FIGURES]
    return run


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        accelerated = train(folder, accelerated=True)
        assert accelerated.state is not None
        assert accelerated.state.served == STEPS
        assert accelerated.state.fallbacks == {}
        ratios = accelerated.figures[FIGURES.index("val/ratio") :: len(FIGURES)]
        assert max(abs(ratio - 1) for ratio in ratios) < 1e-4  # scores are the training forward's
        replayed = train(folder, accelerated=False, replayed=accelerated.rollouts)
        assert len(replayed.figures) == STEPS * len(FIGURES)
        difference = max(
            abs(mine - theirs) / max(1e-3, abs(theirs))
            for mine, theirs in zip(accelerated.figures, replayed.figures, strict=True)
        )
        assert difference < 1e-3, (accelerated.figures, replayed.figures)
        plain = train(folder, accelerated=False)
    speedup = min(plain.seconds) / min(accelerated.seconds)
    assert speedup > 1
    report = {"served": STEPS, "largest relative difference": difference, "speed-up": speedup}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
