"""A study on paper: what more GPUs buy, up to 1024, and what the links take of it.

Strong scaling keeps the global batch, which is capped (1024 sequences of 512 tokens in the paper:
larger batches learn less from a sample); weak scaling keeps the sequences of each GPU. What the
links take is the difference to links without cost.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf.plan.devices import Device
from rlhf.plan.memory import Models, Recipe, Strategy
from rlhf.plan.search import Plan, evaluate, search
from rlhf.plan.systems import System
from rlhf.plan.time import Cluster, Estimator

GPU_COUNTS = tuple(2**n for n in range(11))
WEAK_ROWS = 16  # sequences of each GPU


@dataclass(frozen=True)
class Point:
    """One number of GPUs."""

    gpus: int
    batch: int
    layout: str
    seconds: float  # of an iteration
    links: float  # of them, waiting for links
    phases: dict[str, float]

    @property
    def rate(self) -> float:
        """Sequences a second and GPU."""
        return self.batch / self.seconds / self.gpus


def without_links(plan: Plan) -> float:
    """Seconds of the same plan's iteration if links cost nothing."""
    free = replace(plan.system, links=1e12, collective_seconds=0.0)
    return evaluate(
        plan.models, plan.recipe, plan.strategy, plan.cluster, free, dtype="float16"
    ).step_seconds


def point(models: Models, recipe: Recipe, cluster: Cluster, system: System) -> Point | None:
    """The fastest layout that fits, or None."""
    plan = search(models, recipe, cluster, system, dtype="float16")[0]
    if plan.obstacle is not None:
        return None
    waiting = plan.step_seconds - without_links(plan)
    return Point(
        cluster.gpus, recipe.batch, str(plan.strategy), plan.step_seconds, waiting, plan.seconds
    )


def strong(models: Models, recipe: Recipe, device: Device, system: System) -> list[Point]:
    """The recipe's batch on more and more GPUs, as far as each has a sequence."""
    counts = [gpus for gpus in GPU_COUNTS if gpus <= recipe.batch]
    found = [point(models, recipe, Cluster(device, gpus), system) for gpus in counts]
    return [p for p in found if p is not None]


def weak(models: Models, recipe: Recipe, device: Device, system: System) -> list[Point]:
    """WEAK_ROWS sequences for each GPU."""
    found = [
        point(models, replace(recipe, batch=WEAK_ROWS * gpus), Cluster(device, gpus), system)
        for gpus in GPU_COUNTS
    ]
    return [p for p in found if p is not None]


def zero3_shares(models: Models, recipe: Recipe, device: Device, system: System) -> dict[str, Any]:
    """Share of a ZeRO-3 iteration of the recipe's batch that waits for links, by GPU count."""
    counts = [gpus for gpus in GPU_COUNTS[1:] if gpus <= recipe.batch]
    shares: dict[str, Any] = {"gpus": counts, "links": {}}
    for name, changed in {
        "NVLink everywhere": replace(device, gpus_per_node=GPU_COUNTS[-1]),
        "NVLink and InfiniBand": device,
        "InfiniBand at half its rate": replace(device, network=device.network / 2),
    }.items():
        row = []
        for gpus in shares["gpus"]:
            rows = min(WEAK_ROWS, recipe.batch // gpus)
            layout = Strategy(stage=3, micro_batch=rows, rollout_batch=rows)
            plan = evaluate(models, recipe, layout, Cluster(changed, gpus), system, dtype="float16")
            row.append(1 - without_links(plan) / plan.step_seconds)
        shares["links"][name] = row
    return shares


def tensor_parallel_steps(
    models: Models, recipe: Recipe, device: Device, system: System
) -> dict[str, Any]:
    """Milliseconds of a decode step by TP width, inside a node over NVLink and over InfiniBand."""
    steps: dict[str, Any] = {"width": [1, 2, 4, 8], "links": {}}
    for name, changed in {
        "NVLink": device,
        "InfiniBand": replace(device, gpus_per_node=1),
    }.items():
        row = []
        for width in steps["width"]:
            layout = Strategy(stage=3, tp=width, rollout_batch=WEAK_ROWS)
            estimator = Estimator(models, recipe, layout, Cluster(changed, 8), system, "float16")
            row.append(1e3 * estimator.decode_step(WEAK_ROWS))
        steps["links"][name] = row
    return steps


def study(models: Models, recipe: Recipe, device: Device, system: System) -> dict[str, Any]:
    """The whole study of one model, as plain data."""

    def rows(points: list[Point]) -> list[dict[str, Any]]:
        return [
            {
                "gpus": p.gpus, "batch": p.batch, "layout": p.layout, "seconds": p.seconds,
                "link_seconds": p.links, "sequences_per_s_per_gpu": p.rate, "phases": p.phases,
            }
            for p in points
        ]  # fmt: skip

    return {
        "simulation": "closed form, not measured", "system": system.name, "source": system.source,
        "model": models.actor.name, "critic": models.critic.name, "gpu": device.name,
        "strong": rows(strong(models, recipe, device, system)),
        "weak": rows(weak(models, recipe, device, system)),
        "zero3": zero3_shares(models, recipe, device, system),
        "tensor_parallel": tensor_parallel_steps(models, recipe, device, system),
    }  # fmt: skip


def write_study(studies: list[dict[str, Any]], folder: Path) -> list[Path]:
    """scaling.json and scaling.png in the folder."""
    from rlhf.plan.plots import plot_study

    folder.mkdir(parents=True, exist_ok=True)
    data, image = folder / "scaling.json", folder / "scaling.png"
    data.write_text(json.dumps(studies, indent=1) + "\n")
    plot_study(studies, image)
    return [data, image]
