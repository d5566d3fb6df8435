"""Where a killed run goes on."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.config.checks import not_negative, positive


@dataclass(frozen=True)
class CheckpointConfig:
    """Where a killed run goes on with --resume. Finished steps leave none."""

    every_steps: int = 200
    """Optimizer steps of SFT, reward model and DPO from one to the next; 0: none."""
    every_iterations: int = 20
    """PPO iterations from one to the next; 0: none."""
    keep: int = 2
    """So many are kept."""

    def __post_init__(self) -> None:
        not_negative(self, "every_steps", "every_iterations")
        positive(self, "keep")
