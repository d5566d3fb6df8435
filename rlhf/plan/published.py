"""The times that DeepSpeed-Chat published, and the planner told that system's throughputs.

For each model the paper gives TFLOP/s of generation and of training at one number of GPUs. They set
two constants of the model: the share of the bandwidth at which the KV cache is read, and the share
of the FLOP/s in forward and update. Everything else, other GPU counts above all, is predicted.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

from rlhf.plan.devices import TFLOPS, find_device
from rlhf.plan.memory import Models, Recipe
from rlhf.plan.search import Plan, search
from rlhf.plan.shapes import find_shape
from rlhf.plan.systems import DEEPSPEED_CHAT, System
from rlhf.plan.time import Cluster

DTYPE = "float16"


@dataclass(frozen=True)
class Comparison:
    """A published time beside the planned one."""

    model: str
    gpu: str
    gpus: int
    published_hours: float
    plan: Plan
    batch_is_known: bool  # the GPUs share the published batch of 1024; memory does not cut it

    @property
    def planned_hours(self) -> float:
        return self.plan.total_seconds / 3600

    @property
    def error(self) -> float:
        """Of the planned time, relative to the published one."""
        return self.planned_hours / self.published_hours - 1


@functools.cache
def tables() -> dict[str, Any]:
    """The published tables."""
    loaded: dict[str, Any] = json.loads(files("rlhf.plan").joinpath("published.json").read_text())
    return loaded


def recipe() -> Recipe:
    published = tables()["recipe"]
    return Recipe(**{k: v for k, v in published.items() if k != "critic"})


def models(name: str) -> Models:
    return Models(find_shape(name), find_shape(tables()["recipe"]["critic"]))


def best_plan(model: str, gpu: str, gpus: int, system: System) -> Plan:
    cluster = Cluster(find_device(gpu), gpus)
    return search(models(model), recipe(), cluster, system, dtype=DTYPE)[0]


@functools.cache
def told(model: str) -> System:
    """DeepSpeed-Chat's system with its published throughputs of one model.

    The planner lays out the work anew whenever the constants move, so they are found by iteration.
    """
    row = next(row for row in tables()["throughput"] if row["model"] == model)
    shape, published = find_shape(model), recipe()
    flops = published.batch / row["gpus"] * shape.published_flops(published.sequence)
    rollout = flops / (row["generation_tflops"] * TFLOPS)
    rest = 4 * flops / (row["training_tflops"] * TFLOPS)  # five passes in all, one of them rollout
    system = DEEPSPEED_CHAT
    for _ in range(40):
        plan = best_plan(model, row["gpu"], row["gpus"], system)
        too_long = plan.seconds["rollout"] / rollout
        rest_too_long = (plan.step_seconds - plan.seconds["rollout"]) / rest
        if max(abs(too_long - 1), abs(rest_too_long - 1)) < 1e-3:
            break
        share = system.update * rest_too_long
        system = replace(
            system,
            cache_read=system.cache_read * too_long,
            decode=share,
            forward=share,
            update=share,
        )
    return system


def compare() -> list[Comparison]:
    """Every published time of step 3."""
    found = []
    for row in tables()["step3"]:
        plan = best_plan(row["model"], row["gpu"], row["gpus"], told(row["model"]))
        known = row["gpu"] == "A100-80" and row["gpus"] >= 8  # where throughputs were published
        found.append(Comparison(row["model"], row["gpu"], row["gpus"], row["hours"], plan, known))
    return found


def largest_on_one_gpu(gpu: str) -> str:
    """The largest OPT for which any layout fits on one GPU of a kind."""
    sizes = ("1.3b", "2.7b", "6.7b", "13b", "30b", "66b")
    fitting = [
        size for size in sizes if best_plan(f"opt-{size}", gpu, 1, DEEPSPEED_CHAT).obstacle is None
    ]
    return f"opt-{fitting[-1]}"
