"""PPO on gloo ranks against one process: the same prompts, the same tokens, the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hybrid_engine import EngineConfig
from rlhf.config import LoraConfig, OptimizerConfig, PPOConfig, TrainingConfig
from rlhf.data import train_tokenizer
from rlhf.engines import Engines
from rlhf.experience import Experience
from rlhf.models import add_adapters, save_model
from rlhf.trainers import PPOTrainer, RLHFEngine
from tests.distributed import training
from tests.distributed.ranks import run_ranks

PROMPTS = [[1, 50, 60], [1, 7], [1, *range(70, 82)], [1, 90, 91, 92, 93], [1, 7], [1, 44, 45],
           [1, 99, 98], [1, 20, 30, 40]]  # fmt: skip
EQUAL = [1, 4]  # of the prompts, on two ranks
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_fraction=0.0)
LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
ITERATIONS = 2


def trainer_of(
    zero_stage: int | None, lora: bool, options: dict[str, Any], *, tp: int = 1, **ppo: Any
) -> PPOTrainer:
    actor, (critic, reward) = training.llama(), (training.scorer(seed) for seed in (1, 2))
    actor.generation_config.eos_token_id = [2, *range(100, 130)]
    if lora:
        torch.manual_seed(5)
        add_adapters(actor, LORA)
        add_adapters(critic, LORA)
    engine = RLHFEngine(
        actor, critic, reward, train_tokenizer(["count from 3 to 6"], vocab_size=270),
        engines=Engines(TrainingConfig(**options), zero_stage=zero_stage),  # type: ignore[arg-type]
        engine_config=EngineConfig(inference_tp_size=tp),
    )  # fmt: skip
    config = PPOConfig(
        **{
            "batch_size": len(PROMPTS), "mini_batches": 2, "micro_batch_size": 2,
            "iterations": ITERATIONS, "max_new_tokens": 10, "kl_coef": 0.1, "ema_decay": 0.9,
            "actor_optimizer": OPTIMIZER, "critic_optimizer": OPTIMIZER, **ppo,
        }
    )  # fmt: skip
    return PPOTrainer(engine, config, seed=3)


def run(
    zero_stage: int | None, lora: bool, options: dict[str, Any], folder: Path, tp: int
) -> dict[str, Any]:
    trainer = trainer_of(zero_stage, lora, options, tp=tp)
    history, experiences = [], []
    for _ in range(ITERATIONS):
        experience = trainer.generate_experience(PROMPTS)
        trainer.train_rlhf(experience)
        experiences.append(experience)
        left_out = ("timing_s/", "perf/")
        history.append({n: v for n, v in trainer.metrics.items() if not n.startswith(left_out)})
    assert trainer.critic is not None
    assert trainer.average is not None
    weights = {"actor": trainer.actor.weights(), "critic": trainer.critic.weights()}
    average = trainer.average.weights()
    if weights["actor"]:  # on the first rank
        actor = trainer.actor.module
        save_model(actor, trainer.engine.tokenizer, folder, weights=weights["actor"], base="base")
    return {"history": history, "experiences": experiences, "average": average, **weights}


@pytest.fixture(scope="module", params=[False, True], ids=["full", "lora"])
def alone(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[bool, dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("alone")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = run(None, request.param, {}, folder, 1)
    torch.set_num_threads(threads)
    return request.param, found, folder


@pytest.mark.parametrize(
    ("zero_stage", "world", "tp"),
    [
        pytest.param(0, 2, 1, id="zero0", marks=pytest.mark.slow),
        pytest.param(1, 2, 1, id="zero1", marks=pytest.mark.slow),
        pytest.param(2, 2, 1, id="zero2"),
        pytest.param(3, 2, 1, id="zero3"),
        pytest.param(2, 2, 2, id="zero2-tp2", marks=pytest.mark.slow),
        pytest.param(3, 4, 2, id="zero3-tp2-W4"),
    ],
)
def test_ppo_is_that_of_one_process(
    alone, tmp_path: Path, zero_stage: int, world: int, tp: int
) -> None:
    """Gradients are added up in another order, so Adam may move a weight whose gradient is nearly 0
    the other way: by 2 lr at most a step, seldom; all others agree to rounding."""
    lora, expected, saved = alone
    (tmp_path / "deepspeed.json").write_text(training.PERSIST_NOTHING)
    # Recomputed activations change nothing, at one of the cases for all.
    options = {"deepspeed_config": str(tmp_path / "deepspeed.json"),
               "gradient_checkpointing": world == 4}  # fmt: skip
    first, *others = run_ranks(
        run, zero_stage, lora, options, tmp_path / "actor", tp, world=world, timeout=120
    )
    for found, wanted in zip(first["experiences"], expected["experiences"], strict=True):
        assert_same_tokens(found, wanted)
        assert not torch.equal(*found.input_ids[EQUAL])
    for found, wanted in zip(first["history"], expected["history"], strict=True):
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    for name in ("actor", "critic", "average"):
        assert_close(first[name], expected[name])
        assert not any(other[name] for other in others)
    assert all(other["history"] == first["history"] for other in others)
    adapter = "adapter/adapter_model.safetensors"
    assert {str(p.relative_to(saved)) for p in saved.rglob("*")} == {
        str(p.relative_to(tmp_path / "actor")) for p in (tmp_path / "actor").rglob("*")
    }
    for file in ("model.safetensors", *([adapter] if lora else [])):
        assert_close(load_file(tmp_path / "actor" / file), load_file(saved / file))
    if lora:  # what is frozen has not moved by a bit
        frozen = [n for n in expected["actor"] if "lora_" not in n]
        assert frozen
        assert all(torch.equal(first["actor"][n], expected["actor"][n]) for n in frozen)


def assert_same_tokens(found: Experience, wanted: Experience) -> None:
    """And what was measured of them, up to rounding."""
    assert torch.equal(found.input_ids, wanted.input_ids)
    assert torch.equal(found.response_lengths, wanted.response_lengths)
    for name in ("old_logprobs", "ref_logprobs", "values", "scores", "advantages", "returns"):
        torch.testing.assert_close(
            getattr(found, name), getattr(wanted, name), rtol=1e-3, atol=1e-4
        )


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        difference = (found[name] - weight).abs()
        assert float(difference.max()) <= 2 * ITERATIONS * 2 * OPTIMIZER.learning_rate, name
        assert float((difference > 1e-5).float().mean()) < 0.01, name


def fewer_prompts_than_ranks() -> str:
    with pytest.raises(ValueError, match="processes") as caught:
        trainer_of(2, False, {}).generate_experience(PROMPTS[:1])
    return str(caught.value)


def test_every_rank_needs_a_prompt() -> None:
    expected = "a rollout of 1 prompts for 2 processes: raise batch_size, or give more prompts"
    assert run_ranks(fewer_prompts_than_ranks) == [expected] * 2


def _groups(zero_stage: int | None) -> Experience:
    trainer = trainer_of(zero_stage, False, {}, algorithm="grpo", samples_per_prompt=3)
    experience = trainer.generate_experience(PROMPTS)
    trainer.train_rlhf(experience)
    return experience


def test_groups_are_sampled_as_on_one_process() -> None:
    """Three responses to each prompt, the equal prompts on two ranks among them."""
    expected = _groups(None)
    assert len({tuple(row) for row in expected.input_ids[3:6].tolist()}) == 3
    for found in run_ranks(_groups, 2):
        assert_same_tokens(found, expected)
        sizes = found.groups.unique(return_counts=True)[1]
        assert sizes.tolist() == [3] * len(PROMPTS)
