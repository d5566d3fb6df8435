"""TRL's trainers, unmodified, on an accelerated model: the same training, rolled out by the engine.

With top_k=1 both loops must pick the same tokens, so losses are comparable step by step. Equal
completions have no advantages, so what trains there is the KL to another reference; with samples,
the tokens of the accelerated run are given to the other one too.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

import hybrid_engine as he
from hybrid_engine import ops
from hybrid_engine.ops import registry
from rlhf.data import train_tokenizer

trl = pytest.importorskip("trl")

PROMPTS = [f"add {a} and {b}" for a in range(6) for b in range(6)]
STEPS = 3
FIGURES = ("loss", "grad_norm", "reward", "completions/mean_length")
TRAINERS = {"GRPO": ("GRPOTrainer", "GRPOConfig"), "RLOO": ("RLOOTrainer", "RLOOConfig")}


def variety(completions: list[str], **columns: Any) -> list[float]:
    return [len(set(text)) / 4 for text in completions]


@pytest.fixture(autouse=True)
def as_users_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without the checks of the tests, which cost time; one thread, so that it can be compared."""
    monkeypatch.setattr(registry, "_CHECK", "0")
    torch.use_deterministic_algorithms(False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass
class Run:
    """What a short training gave."""

    state: he.Acceleration | None
    figures: list[float] = field(default_factory=list)  # FIGURES of each step
    gradient_norms: list[float] = field(default_factory=list)
    rollouts: list[Any] = field(default_factory=list)  # what TRL's generation returned
    seconds: list[float] = field(default_factory=list)  # processor time of each rollout


def train(
    name: str, folder: Path, *, accelerated: bool, lora: bool = False,
    replayed: list[Any] | None = None, **options: Any,
) -> Run:  # fmt: skip
    """A short run; `replayed` are the rollouts that it is given instead of generating."""
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
    with torch.no_grad():  # so that the policy is not the reference
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    if accelerated:
        he.accelerate(model)
    trainer_class, config_class = (getattr(trl, part) for part in TRAINERS[name])
    settings = {
        "output_dir": str(folder), "max_steps": STEPS, "per_device_train_batch_size": 4,
        "num_generations": 2, "max_completion_length": 12, "learning_rate": 1e-2, "beta": 0.1,
        "report_to": "none", "use_cpu": True, "bf16": False, "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, **options,
    }  # fmt: skip
    peft_config = None
    if lora:
        peft_config = pytest.importorskip("peft").LoraConfig(
            r=4, target_modules="all-linear", init_lora_weights=False
        )
    trainer = trainer_class(
        model=model, processing_class=tokenizer, args=config_class(**settings),
        reward_funcs=variety, train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        peft_config=peft_config,
    )  # fmt: skip
    run = Run(he.acceleration(model))
    generate = trainer._generate_single_turn

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        result = replayed[len(run.rollouts)] if replayed else generate(*args, **kwargs)
        run.seconds.append(time.process_time() - start)
        run.rollouts.append(copy.deepcopy(result))
        return result

    trainer._generate_single_turn = timed
    trainer.train()
    logs = [log for log in trainer.state.log_history if "completions/mean_length" in log]
    run.figures = [log[key] for log in logs for key in FIGURES]
    run.gradient_norms = run.figures[FIGURES.index("grad_norm") :: len(FIGURES)]
    return run


def assert_rolled_out(run: Run) -> None:
    assert run.state is not None
    assert run.state.served == STEPS
    assert run.state.fallbacks == {}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "GRPO": ("GRPO", {}),
    "RLOO": ("RLOO", {}),
    "GRPO-LoRA": ("GRPO", {"lora": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_greedy_training_is_the_same_and_rollouts_are_faster(name: str, tmp_path: Path) -> None:
    trainer, options = CASES[name]
    plain = train(trainer, tmp_path / "plain", accelerated=False, top_k=1, **options)
    assert plain.state is None
    accelerated = train(trainer, tmp_path / "accelerated", accelerated=True, top_k=1, **options)
    assert_rolled_out(accelerated)
    assert len(plain.figures) == len(FIGURES) * STEPS
    assert accelerated.figures == pytest.approx(plain.figures, abs=1e-4)
    if ops.NATIVE.library is not None:  # the reference is not meant to be fast
        assert min(accelerated.seconds) < min(plain.seconds)


@pytest.mark.parametrize("name", CASES)
def test_sampled_training_is_the_same(name: str, tmp_path: Path) -> None:
    """The same samples give the same losses whether the model is accelerated or not."""
    trainer, options = CASES[name]
    accelerated = train(trainer, tmp_path / "accelerated", accelerated=True, **options)
    assert_rolled_out(accelerated)
    plain = train(
        trainer, tmp_path / "plain", accelerated=False, replayed=accelerated.rollouts, **options
    )
    assert min(accelerated.gradient_norms) > 1e-3
    # Rounding: HF's own generate against a replay of it differs as much, by where memory lies.
    assert accelerated.figures == pytest.approx(plain.figures, rel=1e-4, abs=1e-6)


def test_generate_batch_trains_the_same(tmp_path: Path) -> None:
    """TRL's continuous batching calls `generate_batch`."""
    plain = train("GRPO", tmp_path / "plain", accelerated=False, top_k=1)
    batch = train(
        "GRPO", tmp_path / "batch", accelerated=True, top_k=1,
        use_transformers_continuous_batching=True,
    )  # fmt: skip
    assert_rolled_out(batch)
    assert batch.figures == pytest.approx(plain.figures, abs=1e-4)


def test_mixed_precision(tmp_path: Path) -> None:
    """fp32 weights under autocast to bf16: rollouts in bf16, and a training that goes on."""
    run = train("GRPO", tmp_path, accelerated=True, bf16=True)
    assert_rolled_out(run)
    assert all(math.isfinite(figure) for figure in run.figures)
