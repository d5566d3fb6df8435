"""Step 1."""

from __future__ import annotations

from dataclasses import dataclass, field

from rlhf.config.checks import positive
from rlhf.config.data import DataConfig
from rlhf.config.training import OptimizerConfig


@dataclass(frozen=True)
class SFTConfig:
    """Step 1, supervised fine-tuning: cross-entropy on the completions."""

    data: DataConfig = field(default_factory=DataConfig)
    """Demonstrations."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer."""
    epochs: int = 1
    """Passes over the data."""
    batch_size: int = 32
    """Rows in an optimizer step."""
    micro_batch_size: int = 32
    """Rows in a forward pass; memory, not results, depends on it."""
    eval_steps: int | None = None
    """Optimizer steps between evaluations on held-out rows; default: an epoch."""
    keep_best: bool = True
    """Keep the weights of the lowest held-out loss; false: the last."""

    def __post_init__(self) -> None:
        positive(self, "epochs", "batch_size", "micro_batch_size", "eval_steps")
