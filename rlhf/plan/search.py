"""Which ways of laying out the work fit, and which of them is fastest."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rlhf.plan.memory import Models, Recipe, Strategy, host_bytes, peak, phases, usable
from rlhf.plan.systems import System
from rlhf.plan.time import Cluster, Estimator


@dataclass(frozen=True)
class Plan:
    """One strategy on one cluster: its memory, and its time if it fits."""

    models: Models
    recipe: Recipe
    strategy: Strategy
    cluster: Cluster
    system: System
    memory: dict[str, dict[str, float]]  # phase -> what -> bytes on one GPU
    seconds: dict[str, float]  # phase -> seconds of an iteration
    obstacle: str | None = None  # why it does not fit

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def total_seconds(self) -> float:
        return self.step_seconds * self.recipe.iterations

    @property
    def dollars(self) -> float:
        device = self.cluster.device
        return self.total_seconds / 3600 * self.cluster.gpus * device.dollars


def evaluate(
    models: Models, recipe: Recipe, strategy: Strategy, cluster: Cluster, system: System,
    *, dtype: str = "bfloat16",
) -> Plan:  # fmt: skip
    """Memory and time of a strategy as it stands."""
    memory = phases(models, recipe, strategy, cluster.gpus, logit_bytes=system.logit_bytes)
    estimator = Estimator(models, recipe, strategy, cluster, system, dtype)
    return Plan(
        models, recipe, strategy, cluster, system, memory, estimator.phases(),
        _obstacle(models, strategy, cluster, memory),
    )  # fmt: skip


def _obstacle(
    models: Models, strategy: Strategy, cluster: Cluster, memory: dict[str, dict[str, float]]
) -> str | None:
    phase, needed = peak(memory)
    room, host = usable(cluster.device), host_bytes(models, strategy, cluster.gpus)
    if needed > room:
        return f"{phase} needs {needed / 1e9:.1f} GB of {room / 1e9:.1f}"
    if host > cluster.device.host_memory:
        return f"host needs {host / 1e9:.0f} GB a GPU of {cluster.device.host_memory / 1e9:.0f}"
    return None


def layouts(cluster: Cluster, lora: int | None) -> Iterator[Strategy]:
    """Every combination worth a thought, batches aside."""
    stages = (0, 1, 2, 3) if cluster.gpus > 1 else (0, 2)
    widths = [n for n in (1, 2, 4, 8) if n <= min(cluster.gpus, cluster.device.gpus_per_node)]
    for stage, offload, checkpointing, tp in itertools.product(
        stages, (False, True), (False, True), widths
    ):
        if (tp > 1 and stage < 3) or (offload and stage < 2):
            continue  # weights that are whole on every GPU need no tensor parallelism
        if cluster.gpus == 1 and stage == 2 and not offload:
            continue  # the same as stage 0
        yield Strategy(stage=stage, offload=offload, tp=tp, lora=lora, checkpointing=checkpointing)


def fill(
    models: Models, recipe: Recipe, strategy: Strategy, cluster: Cluster, system: System,
    *, dtype: str = "bfloat16",
) -> Plan:  # fmt: skip
    """The strategy with the largest batches that fit, of powers of two and the GPU's share."""
    share = -(-recipe.batch // cluster.gpus)
    sizes = [size for size in (2**n for n in range(12)) if size < share] + [share]

    def largest(field: str, phase_names: tuple[str, ...], start: Strategy) -> Strategy:
        best = start
        for size in sizes:
            trial = replace(start, **{field: size})
            memory = phases(models, recipe, trial, cluster.gpus, logit_bytes=system.logit_bytes)
            needed = max(sum(memory[name].values()) for name in phase_names)
            if needed <= usable(cluster.device):
                best = trial
        return best

    strategy = largest("rollout_batch", ("rollout",), strategy)
    updates = ("score", "update actor", "update critic")
    strategy = largest("micro_batch", updates, strategy)
    return evaluate(models, recipe, strategy, cluster, system, dtype=dtype)


def search(
    models: Models, recipe: Recipe, cluster: Cluster, system: System,
    *, lora: int | None = None, dtype: str = "bfloat16",
) -> list[Plan]:  # fmt: skip
    """Every layout with its best batches: those that fit first, the fastest of them at the head.

    Raises ValueError when the batch has fewer sequences than there are GPUs.
    """
    if recipe.batch < cluster.gpus:
        raise ValueError(
            f"a batch of {recipe.batch} cannot feed {cluster.gpus} GPUs: give a larger batch, or "
            f"at most {recipe.batch} GPUs"
        )
    plans = [
        fill(models, recipe, strategy, cluster, system, dtype=dtype)
        for strategy in layouts(cluster, lora)
    ]
    return sorted(plans, key=lambda plan: (plan.obstacle is not None, plan.total_seconds))
