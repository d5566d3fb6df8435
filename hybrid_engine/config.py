"""Settings of the engine, and what DeepSpeed's names for them mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

_POSITIVE = (
    "max_running", "block_size", "max_prefill_tokens", "max_out_tokens", "max_cache_gb",
    "inference_tp_size", "tp_gather_partition_size",
)  # fmt: skip
# Keys of DeepSpeed's section that carry no setting of ours: its switch, and graphs, which are used
# wherever the device has them.
_WITHOUT_MEANING = {"enabled", "enable_cuda_graph"}
_DEEPSPEED_DEFAULTS: dict[str, Any] = {
    "max_out_tokens": 512,
    "inference_tp_size": 1,
    "release_inference_cache": False,
    "pin_parameters": True,
    "tp_gather_partition_size": 8,
}


@dataclass(frozen=True)
class EngineConfig:
    """Limits of a rollout, and where its weights are. Only `dtype` changes what is said."""

    max_running: int = 256  # sequences that decode together
    block_size: int = 16  # tokens in a block of the KV cache
    max_prefill_tokens: int = 8192  # prompt tokens that are prefilled in one pass
    max_cache_gb: float | None = None  # of the KV cache; None: most of the free memory
    max_out_tokens: int | None = None  # of prompt and response together; None: the positions
    release_inference_cache: bool = True  # free the KV cache at the end of each rollout
    dtype: Literal["bfloat16", "float16"] | None = None  # of rollouts; None: as weights are stored
    inference_tp_size: int = 1  # ranks that share one copy of the weights in rollouts
    pin_parameters: bool | None = None  # ZeRO-3: gather once a rollout; None: if memory allows
    tp_gather_partition_size: int = 8  # ZeRO-3: small layers that one collective gathers at most

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name} must be positive, got {value}")
        if self.dtype not in (None, "bfloat16", "float16"):
            raise ValueError(f"dtype must be bfloat16, float16 or None, got {self.dtype!r}")

    @property
    def rollout_dtype(self) -> torch.dtype | None:
        """The type of `dtype`."""
        return None if self.dtype is None else getattr(torch, self.dtype)

    @classmethod
    def from_deepspeed(cls, config: Mapping[str, Any], **settings: Any) -> EngineConfig:
        """The settings of the `hybrid_engine` section of a DeepSpeed config.

        Keys left out have DeepSpeed's defaults; `settings` are fields that it has no key for.
        Raises ValueError for a key that is not of this section.
        """
        section = dict(config.get("hybrid_engine", {}))
        known = _DEEPSPEED_DEFAULTS.keys() | _WITHOUT_MEANING
        if unknown := section.keys() - known:
            raise ValueError(
                f"hybrid_engine has no key {', '.join(sorted(unknown))}; it has "
                f"{', '.join(sorted(known))}"
            )
        named = {key: section.get(key, default) for key, default in _DEEPSPEED_DEFAULTS.items()}
        return cls(**{**named, **settings})
