"""What turns losses into weight updates."""

from rlhf.engines.single import SingleProcessEngine, StepInfo

__all__ = ["SingleProcessEngine", "StepInfo"]
