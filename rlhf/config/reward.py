"""Step 2."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlhf.config.checks import not_negative, positive
from rlhf.config.data import DataConfig
from rlhf.config.training import OptimizerConfig


@dataclass(frozen=True)
class RewardConfig:
    """Step 2, the reward model: pairwise loss on preferences."""

    data: DataConfig = field(default_factory=DataConfig)
    """Preference pairs."""
    model_path: str | None = None
    """The model to start from; default: the SFT model in the output folder."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer."""
    epochs: int = 1
    """Passes over the data; more than one overfits on real preferences."""
    batch_size: int = 32
    """Pairs in an optimizer step."""
    micro_batch_size: int = 32
    """Pairs in a forward pass; memory, not results, depends on it."""
    centring_coef: float = 0.0
    """Weight of (chosen + rejected)^2 in the loss, which keeps scores about 0."""
    eval_steps: int | None = None
    """Optimizer steps between evaluations on held-out rows; default: an epoch."""
    keep_best: bool = True
    """Keep the weights of the lowest held-out loss; false: the last."""

    def __post_init__(self) -> None:
        positive(self, "epochs", "batch_size", "micro_batch_size", "eval_steps")
        not_negative(self, "centring_coef")
