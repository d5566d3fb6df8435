"""Which engine a model gets."""

from __future__ import annotations

from typing import Literal

from torch import nn

from rlhf.config import OptimizerConfig
from rlhf.engines.interface import Engine, PlainEngine, TrainingEngine
from rlhf.engines.single import SingleProcessEngine

Role = Literal["actor", "critic", "reference", "reward", "ema"]


class Engines:
    """Makes the engine of each model."""

    def training(
        self, module: nn.Module, config: OptimizerConfig, *, total_steps: int, role: Role = "actor"
    ) -> TrainingEngine:
        """For a model that learns: SFT's and the actor are "actor", reward's and critic "critic".

        total_steps: optimizer steps that the schedule of the learning rate spans.
        """
        return SingleProcessEngine(module, config, total_steps=total_steps)

    def frozen(self, module: nn.Module, *, role: Role) -> Engine:
        """For a model that is only read."""
        return PlainEngine(module)
