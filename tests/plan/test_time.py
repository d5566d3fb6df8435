"""The time model: its rooflines by hand, and what must not change it."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest

from rlhf.plan import Cluster, Estimator, Models, Recipe, Strategy, find_device, find_shape, search
from rlhf.plan.scaling import strong, without_links
from rlhf.plan.supervised import supervised
from rlhf.plan.systems import HYBRID

H100 = find_device("h100")
MODELS = Models(find_shape("opt-1.3b"), find_shape("opt-350m"))


def estimator(gpus: int = 1, **strategy: int) -> Estimator:
    layout = Strategy(**{"rollout_batch": 1024, "micro_batch": 8, **strategy})  # type: ignore[arg-type]
    return Estimator(MODELS, Recipe(), layout, Cluster(H100, gpus), HYBRID)


def test_decode_at_batch_1_reads_the_weights() -> None:
    floor = 2 * find_shape("opt-1.3b").parameters / H100.bandwidth  # 0.785 ms
    assert 1e3 * floor == pytest.approx(0.785, abs=0.001)
    step = estimator().decode_step(1)
    assert floor / HYBRID.weight_read < step < 1.1 * floor / HYBRID.weight_read


def test_decode_at_a_large_batch_reads_the_cache() -> None:
    extra = estimator().decode_step(64) - estimator().decode_step(32)
    cache = 2 * 32 * (256 + 128) * 2 * 24 * 2048  # bytes, sequences, tokens, elements
    assert extra == pytest.approx(cache / H100.bandwidth / HYBRID.cache_read)


def test_slow_hosts_set_the_step_of_small_batches() -> None:
    slow = replace(estimator(), system=replace(HYBRID, layer_seconds=1e-3))
    assert slow.decode_step(1) == pytest.approx(24e-3)


def test_update_is_three_forwards_and_one_more_with_checkpointing() -> None:
    lean = replace(estimator(), strategy=Strategy(checkpointing=False))
    times = [e.update(MODELS.actor, None, logits=True) for e in (estimator(), lean)]
    adam = 28 * MODELS.actor.parameters / H100.bandwidth / HYBRID.optimizer
    assert (times[0] - adam) / (times[1] - adam) == pytest.approx(4 / 3)
    flops = 3 * 1024 * MODELS.actor.forward_flops(512)
    assert times[1] - adam == pytest.approx(flops / H100.peak("bfloat16") / HYBRID.update)


def test_collectives_inside_a_node_and_between_nodes() -> None:
    assert Cluster(H100, 1).collective(1e9) == 0
    assert Cluster(H100, 8).collective(8e9) == pytest.approx(7e9 / 450e9)
    two_nodes = Cluster(H100, 16).collective(8e9)  # NVLink 7e9 / 450e9; 8 adapters 4e9 / 400e9
    assert two_nodes == pytest.approx(7e9 / 450e9)
    slow = Cluster(replace(H100, network=5e9), 16)
    assert slow.collective(8e9) == pytest.approx(4e9 / 40e9)


def test_a_device_without_bf16_says_what_it_has() -> None:
    with pytest.raises(ValueError, match="V100-32 has no bfloat16 units: use one of float16"):
        find_device("V100-32").peak("bfloat16")


def test_more_gpus_than_sequences_is_an_error() -> None:
    with pytest.raises(ValueError, match="a batch of 4 cannot feed 8 GPUs"):
        search(MODELS, Recipe(batch=4), Cluster(H100, 8), HYBRID)


def test_the_fastest_layout_that_fits_comes_first() -> None:
    plans = search(MODELS, Recipe(), Cluster(H100, 8), HYBRID)
    fitting = [p.total_seconds for p in plans if p.obstacle is None]
    assert plans[0].obstacle is None
    assert fitting == sorted(fitting)


def test_strong_scaling_never_beats_links_without_cost() -> None:
    points = strong(MODELS, Recipe(batch=64), find_device("A100-80"), HYBRID)
    assert [p.gpus for p in points] == [1, 2, 4, 8, 16, 32, 64]
    assert all(a.seconds > b.seconds for a, b in pairwise(points))
    assert all(0 <= p.links < p.seconds for p in points)
    plan = search(MODELS, Recipe(batch=64), Cluster(find_device("A100-80"), 64), HYBRID)[0]
    assert without_links(plan) < plan.step_seconds


def test_supervised_steps_cost_three_forwards_a_sequence() -> None:
    cluster = Cluster(H100, 8)
    plan = supervised("sft", MODELS.actor, Recipe(), cluster, HYBRID)
    flops = 3 * 1024 / 8 * MODELS.actor.forward_flops(512)
    least = flops / H100.peak("bfloat16") / HYBRID.update
    assert least < plan.step_seconds < 1.2 * least
    with pytest.raises(ValueError, match="sft: no layout of opt-175b fits on 1 x H100"):
        supervised("sft", find_shape("opt-175b"), Recipe(), Cluster(H100, 1), HYBRID)
