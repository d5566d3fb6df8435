"""Which engine a model gets."""

from __future__ import annotations

import os
from typing import Any, Literal

import torch
from torch import nn

from rlhf import distributed
from rlhf.config import OptimizerConfig, ShardingConfig, TrainingConfig, ZeroStage
from rlhf.engines.activations import recompute_activations
from rlhf.engines.interface import Engine, PlainEngine, TrainingEngine
from rlhf.engines.single import SingleProcessEngine


def local_device() -> torch.device:
    """The GPU of this process if there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


Role = Literal["actor", "critic", "reference", "reward", "ema"]


class Engines:
    """Makes the engine of each model: plain torch on one process, DeepSpeed for everything else."""

    def __init__(
        self, config: TrainingConfig | None = None, *, zero_stage: ZeroStage | None = None
    ) -> None:
        self._config = config or TrainingConfig()
        self._zero_stage = zero_stage

    def training(
        self, module: nn.Module, config: OptimizerConfig, *, total_steps: int, role: Role = "actor"
    ) -> TrainingEngine:
        """For a model that learns: SFT's and the actor are "actor", reward's and critic "critic".

        total_steps: optimizer steps that the schedule of the learning rate spans.
        """
        if self._config.gradient_checkpointing:
            recompute_activations(module)
        if not self._needs_deepspeed(role):
            return SingleProcessEngine(module.to(local_device()), config, total_steps=total_steps)
        from rlhf.engines.deepspeed_engine import DeepSpeedEngine

        settings = self._deepspeed_config(module, role, config.max_grad_norm)
        return DeepSpeedEngine(
            module, settings, config, total_steps=total_steps, adam=self._config.adam
        )

    def frozen(self, module: nn.Module, *, role: Role) -> Engine:
        """For a model that is only read: whole on every rank, unless it has ZeRO 3."""
        if self._needs_deepspeed(role):
            settings = self._deepspeed_config(module, role, None)
            if settings["zero_optimization"]["stage"] == 3:
                from rlhf.engines.deepspeed_engine import FrozenDeepSpeedEngine

                return FrozenDeepSpeedEngine(module, settings)
        return PlainEngine(module.to(local_device()))

    def offloads(self, role: Role) -> bool:
        """Whether what belongs to this model, its weights apart, goes to the CPU's memory."""
        return (self._sharding(role).offload or self._config.offload) != "none"

    def _needs_deepspeed(self, role: Role) -> bool:
        config, ours = self._config, self._sharding(role)
        return (
            distributed.world_size() > 1
            or self._zero_stage is not None
            or ours.zero_stage is not None
            or self.offloads(role)
            or config.deepspeed_config is not None
        )

    def _stage(self, role: Role) -> int:
        ours = self._sharding(role).zero_stage
        if ours is None:
            ours = self._zero_stage
        return 2 if ours is None else ours

    def _sharding(self, role: Role) -> ShardingConfig:
        return getattr(self._config, role)

    def _deepspeed_config(
        self, module: nn.Module, role: Role, max_grad_norm: float | None
    ) -> dict[str, Any]:
        from rlhf.engines.deepspeed_config import Sharding, deepspeed_config

        sharding = Sharding(
            self._stage(role),
            self._sharding(role).offload or self._config.offload,
            next(module.parameters()).dtype,
        )
        return deepspeed_config(sharding, self._config, max_grad_norm=max_grad_norm)
