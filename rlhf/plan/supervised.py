"""Steps 1 and 2: one model in training, without rollouts."""

from __future__ import annotations

from dataclasses import dataclass, replace

from rlhf.plan.memory import Models, Recipe, Strategy, host_bytes, phases, usable
from rlhf.plan.search import layouts
from rlhf.plan.shapes import ModelShape
from rlhf.plan.systems import System
from rlhf.plan.time import Cluster, Estimator


@dataclass(frozen=True)
class SupervisedPlan:
    """The fastest layout that fits for SFT or the reward model."""

    step: str
    strategy: Strategy
    memory: dict[str, float]  # what -> bytes on one GPU
    step_seconds: float
    steps: float
    cluster: Cluster

    @property
    def total_seconds(self) -> float:
        return self.step_seconds * self.steps

    @property
    def dollars(self) -> float:
        return self.total_seconds / 3600 * self.cluster.gpus * self.cluster.device.dollars


def supervised(
    step: str, shape: ModelShape, recipe: Recipe, cluster: Cluster, system: System,
    *, lora: int | None = None, dtype: str = "bfloat16",
) -> SupervisedPlan:  # fmt: skip
    """Train `shape` on `recipe.samples` sequences. Raises ValueError when no layout fits."""
    alone = Models(shape, replace(shape, layers=0, vocab=0, positions=0, embed_dim=None))
    best: SupervisedPlan | None = None
    for layout in layouts(cluster, lora):
        if layout.tp > 1:
            continue  # only rollouts use it
        for size in (2**n for n in range(12)):
            if size > max(1, recipe.batch // cluster.gpus):
                break
            strategy = replace(layout, micro_batch=size)
            memory = phases(alone, recipe, strategy, cluster.gpus, logit_bytes=system.logit_bytes)[
                "update actor"
            ]
            memory = {k: v for k, v in memory.items() if k not in ("reference", "reward")}
            fits = sum(memory.values()) <= usable(cluster.device)
            if not fits or host_bytes(alone, strategy, cluster.gpus) > cluster.device.host_memory:
                continue
            estimator = Estimator(alone, recipe, strategy, cluster, system, dtype)
            seconds = estimator.update(shape, lora, logits=step == "sft")
            if best is None or seconds <= best.step_seconds:
                best = SupervisedPlan(step, strategy, memory, seconds, recipe.iterations, cluster)
    if best is None:
        raise ValueError(
            f"{step}: no layout of {shape.name} fits on {cluster.gpus} x {cluster.device.name}; "
            "try --lora, or more GPUs"
        )
    return best
