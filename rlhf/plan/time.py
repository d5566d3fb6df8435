"""Seconds of each phase of a PPO iteration: a roofline of reads, FLOPs, links and host time."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf.plan.devices import Device
from rlhf.plan.memory import HALF, Models, Recipe, Strategy, lora_parameters
from rlhf.plan.shapes import ModelShape
from rlhf.plan.systems import System

ADAM_BYTES = 28  # read and written for each parameter: master, moments, gradient, weight
HOST_BANDWIDTH = 20e9  # bytes/s of the host's memory for each GPU, in an offloaded Adam


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind, in full nodes."""

    device: Device
    gpus: int

    def __post_init__(self) -> None:
        if self.gpus < 1:
            raise ValueError(f"gpus must be at least 1, got {self.gpus}")

    @property
    def nodes(self) -> int:
        return -(-self.gpus // self.device.gpus_per_node)

    def collective(self, size: float, gpus: int | None = None) -> float:
        """Seconds to all-gather or reduce-scatter `size` bytes in all, at the links' peak.

        Each GPU takes in (n - 1)/n of them over its own link; each node takes in what the others
        hold over all its network adapters. The slower of the two.
        """
        gpus = gpus or self.gpus
        device = self.device
        inside = min(gpus, device.gpus_per_node)
        within = size * (inside - 1) / inside / device.link
        if gpus <= device.gpus_per_node:
            return within
        nodes = -(-gpus // device.gpus_per_node)
        between = size * (nodes - 1) / nodes / (device.network * device.gpus_per_node)
        return max(within, between)


@dataclass(frozen=True)
class Estimator:
    """The time model of one set-up; every method gives seconds of an iteration on each GPU."""

    models: Models
    recipe: Recipe
    strategy: Strategy
    cluster: Cluster
    system: System
    dtype: str = "bfloat16"

    @property
    def rows(self) -> float:
        """Sequences of an iteration that each GPU takes."""
        return self.recipe.batch / self.cluster.gpus

    def phases(self) -> dict[str, float]:
        """Phase -> seconds, by the names of the trainer's timing metrics."""
        return {
            "rollout": self.rollout(),
            "score": self.score(),
            "update_actor": self.update(self.models.actor, self.strategy.lora, logits=True),
            "update_critic": self.update(self.models.critic, None, logits=False),
        }

    # ---- rollout ---------------------------------------------------------------------------------

    def rollout(self) -> float:
        waves = math.ceil(self.rows / self.strategy.rollout_batch)
        rows = self.rows / waves
        prefill = rows * self.models.actor.forward_flops(self.recipe.prompt, logits=False)
        wave = prefill / self._flops(self.system.forward)
        wave += self.recipe.response * self.decode_step(rows)
        gather = 0.0
        if self._sharded:
            weights = self._element * self.models.actor.parameters
            gather = self.cluster.collective(weights / self.strategy.tp) / self.system.links
        return waves * wave + gather

    def decode_step(self, rows: float) -> float:
        """One token for `rows` sequences a GPU, at the mean length of a rollout."""
        actor, tp, system = self.models.actor, self.strategy.tp, self.system
        bandwidth = self.cluster.device.bandwidth
        read = self._element * actor.parameters / tp / (bandwidth * system.weight_read)
        multiply = rows * actor.forward_flops(1) / self._flops(system.decode)
        length = self.recipe.prompt + self.recipe.response / 2
        cache = self._element * rows * length * actor.kv_elements / (bandwidth * system.cache_read)
        device = max(read, multiply) + cache + self._tensor_parallel(rows)
        return max(device, actor.layers * system.layer_seconds)

    def _tensor_parallel(self, rows: float) -> float:
        """Two all-reduces a layer of the hidden states of the group's sequences."""
        actor, tp = self.models.actor, self.strategy.tp
        if tp == 1:
            return 0.0
        size = self._element * rows * tp * actor.hidden
        moved = 2 * self.cluster.collective(size, tp) / self.system.links
        return 2 * actor.layers * (self.system.collective_seconds + moved)

    # ---- score and update ------------------------------------------------------------------------

    def score(self) -> float:
        """Reference, critic, reward, and the actor where its log-probs are computed again."""
        actor, critic = self.models.actor, self.models.critic
        passes = 2 if self.system.rescore_actor else 1
        flops = passes * actor.forward_flops(self.recipe.sequence)
        flops += 2 * critic.forward_flops(self.recipe.sequence, logits=False)
        seconds = self.rows * flops / self._flops(self.system.forward)
        gathered = self._element * (passes * actor.parameters + 2 * critic.parameters)
        return self._with(seconds, gathered * self._micro_batches if self._sharded else 0.0)

    def update(self, shape: ModelShape, lora: int | None, *, logits: bool) -> float:
        """Forward, backward and the optimizer's step of one model, all epochs."""
        strategy, epochs = self.strategy, self.recipe.epochs
        passes = (2 if lora else 3) + (1 if strategy.checkpointing else 0)
        flops = passes * self.rows * shape.forward_flops(self.recipe.sequence, logits=logits)
        seconds = epochs * flops / self._flops(self.system.update)
        trained = lora_parameters(shape, lora) if lora else shape.parameters
        moved = epochs * self._update_bytes(shape.parameters, trained)
        return self._with(seconds, moved) + epochs * self._optimizer(trained)

    def _update_bytes(self, parameters: int, trained: int) -> float:
        """Bytes of the collectives of one update, each counted as `Cluster.collective` does."""
        if self.cluster.gpus == 1:
            return 0.0
        stage, micro_batches = self.strategy.stage, self._micro_batches
        element = self._element
        reduced = element * trained * (micro_batches if stage >= 2 else 1)
        if stage >= 3:
            return 2 * element * parameters * micro_batches + reduced
        return element * trained + reduced  # the weights, or the second half of an all-reduce

    def _optimizer(self, trained: int) -> float:
        share = trained / (self.cluster.gpus if self.strategy.stage >= 1 else 1)
        device = self.cluster.device
        if not self.strategy.offload:
            return ADAM_BYTES * share / (device.bandwidth * self.system.optimizer)
        return 2 * self._element * share / device.pcie + ADAM_BYTES * share / HOST_BANDWIDTH

    # ---- what they share -------------------------------------------------------------------------

    @property
    def _element(self) -> int:
        """Bytes of a weight, a gradient or a cached number."""
        return 4 if self.dtype == "float32" else HALF

    @property
    def _sharded(self) -> bool:
        return self.strategy.stage >= 3 and self.cluster.gpus > 1

    @property
    def _micro_batches(self) -> int:
        return math.ceil(self.rows / self.strategy.micro_batch)

    def _flops(self, share: float) -> float:
        return self.cluster.device.peak(self.dtype) * share

    def _with(self, compute: float, moved: float) -> float:
        """Compute, and what of the communication does not hide under it."""
        seconds = self.cluster.collective(moved) / self.system.links
        return compute + max(0.0, seconds - self.system.overlap * compute)
