"""The generation of PPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf.config.checks import positive


@dataclass(frozen=True)
class RolloutConfig:
    """Where the weights of a rollout are, and the memory that it may take."""

    inference_tp_size: int = 1
    """Processes that share one copy of the weights (tensor parallelism); divides all processes."""
    pin_parameters: bool | None = None
    """ZeRO 3: gather weights once a rollout; false: layer by layer; default: as memory allows."""
    dtype: Literal["bfloat16", "float16"] | None = None
    """Type that rollouts compute in; default: that of the weights."""
    max_cache_gb: float | None = None
    """Of the KV cache; default: most of the free memory."""

    def __post_init__(self) -> None:
        positive(self, "inference_tp_size", "max_cache_gb")
