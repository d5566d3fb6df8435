"""How models are trained: AdamW, and how they are spread over processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rlhf.config.checks import fraction, positive

ZeroStage = Literal[0, 1, 2, 3]
Offload = Literal["none", "optimizer", "all"]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its learning rate."""

    learning_rate: float = 1e-5
    """The highest learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up, to a tenth of its height."""
    warmup_fraction: float = 0.03
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""

    def __post_init__(self) -> None:
        positive(self, "learning_rate", "max_grad_norm")
        fraction(self, "warmup_fraction")


@dataclass(frozen=True)
class ShardingConfig:
    """How one model is spread over processes; what is not given is as for all models."""

    zero_stage: ZeroStage | None = None
    """ZeRO stage of this model."""
    offload: Offload | None = None
    """What of this model lies in the CPU's memory."""


@dataclass(frozen=True)
class TrainingConfig:
    """How models are spread over processes, and what memory their training takes."""

    offload: Offload = "none"
    """To the CPU's memory: the optimizer's state, or (all, with ZeRO 3) the weights too."""
    adam: Literal["fused", "cpu"] = "fused"
    """AdamW of torch, or DeepSpeed's for offload on a GPU, which is compiled when first used."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, a third more time."""
    deepspeed_config: str | None = None
    """JSON file, merged over the DeepSpeed configuration that is made from these options."""
    actor: ShardingConfig = field(default_factory=ShardingConfig)
    """The model of SFT, and PPO's actor."""
    critic: ShardingConfig = field(default_factory=ShardingConfig)
    """The model of the reward step, and PPO's critic."""
    reference: ShardingConfig = field(default_factory=ShardingConfig)
    """PPO's reference."""
    reward: ShardingConfig = field(default_factory=ShardingConfig)
    """PPO's reward model."""
    ema: ShardingConfig = field(default_factory=ShardingConfig)
    """The actor's moving average, which is always divided among the processes."""
