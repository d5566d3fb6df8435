"""RLHF for Hugging Face models: SFT, reward model, DPO and PPO."""

from __future__ import annotations

from typing import Any

_TRAINERS = ("DPOTrainer", "PPOTrainer", "RLHFEngine", "RewardTrainer", "SFTTrainer")

__all__ = ["DPOTrainer", "PPOTrainer", "RLHFEngine", "RewardTrainer", "SFTTrainer"]


def __getattr__(name: str) -> Any:
    """The trainers bring torch and transformers with them, and `rlhf --help` need not wait."""
    if name in _TRAINERS:
        from rlhf import trainers

        return getattr(trainers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
