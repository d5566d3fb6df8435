"""Memory against the ZeRO paper's own figures and hand counts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from rlhf.plan import Cluster, Models, ModelShape, Recipe, Strategy, find_device, find_shape
from rlhf.plan.memory import lora_parameters, phases
from rlhf.plan.search import fill
from rlhf.plan.systems import HYBRID

NOTHING = ModelShape("nothing", 0, 0, 0, 0, 0, 0, 0)
# One matrix of 7.5 B elements and no activations: the model of arXiv 1910.02054, figure 1.
FIGURE = replace(NOTHING, vocab=7_500_000_000, hidden=1)


@pytest.mark.parametrize(
    ("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.9)], ids="ZeRO-{}".format
)
def test_states_are_those_of_the_zero_paper(stage: int, gigabytes: float) -> None:
    layout = Strategy(stage=stage, micro_batch=0)
    update = phases(Models(FIGURE, NOTHING), Recipe(), layout, 64)["update actor"]
    states = update["weights"] + update["gradients"] + update["optimizer"]
    assert states / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_kv_cache_by_hand() -> None:
    models = Models(find_shape("llama-3.1-8b"), find_shape("tiny"))
    sizes = phases(models, Recipe(prompt=100, response=28), Strategy(rollout_batch=3), 1)
    assert sizes["rollout"]["KV cache"] == 2 * 2 * 32 * 8 * 128 * 128 * 3


def test_lora_needs_no_reference_and_few_states() -> None:
    actor = find_shape("opt-1.3b")
    models = Models(actor, find_shape("tiny"))
    full = phases(models, Recipe(), Strategy(), 1)["update actor"]
    small = phases(models, Recipe(), Strategy(lora=8), 1)["update actor"]
    assert full["reference"] == 2 * actor.parameters
    assert small["reference"] == 0
    adapters = 24 * 8 * (4 * (2048 + 2048) + 2 * (2048 + 8192))
    assert lora_parameters(actor, 8) == adapters
    assert small["gradients"] == 2 * adapters


def test_checkpointing_trades_memory_for_a_forward() -> None:
    models = Models(find_shape("opt-1.3b"), find_shape("opt-350m"))
    kept = phases(models, Recipe(), Strategy(checkpointing=False, micro_batch=4), 1)
    cut = phases(models, Recipe(), Strategy(micro_batch=4), 1)
    assert cut["update actor"]["activations"] < kept["update actor"]["activations"] / 6


def test_no_logits_in_training_unless_the_trainer_keeps_them() -> None:
    models = Models(find_shape("opt-1.3b"), find_shape("opt-350m"))
    assert phases(models, Recipe(), Strategy(), 1)["update actor"]["logits"] == 0
    kept = phases(models, Recipe(), Strategy(micro_batch=2), 1, logit_bytes=10)
    assert kept["update actor"]["logits"] == 10 * 2 * 512 * 50272


@pytest.mark.parametrize("gpu", ["A100-40", "H200"])
def test_filled_batches_fit_and_twice_as_many_do_not(gpu: str) -> None:
    models = Models(find_shape("opt-1.3b"), find_shape("opt-350m"))
    cluster, recipe = Cluster(find_device(gpu), 1), Recipe(batch=4096)
    plan = fill(models, recipe, Strategy(stage=2, offload=True), cluster, HYBRID)
    assert plan.obstacle is None
    room = cluster.device.memory * 0.9 - 1e9
    assert max(sum(parts.values()) for parts in plan.memory.values()) <= room
    twice = replace(plan.strategy, rollout_batch=2 * plan.strategy.rollout_batch)
    assert sum(phases(models, recipe, twice, 1)["rollout"].values()) > room


def test_a_recipe_wants_positive_numbers() -> None:
    with pytest.raises(ValueError, match="batch must be at least 1, got 0"):
        Recipe(batch=0)
