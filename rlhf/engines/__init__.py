"""What turns losses into weight updates."""

from rlhf.engines.factory import Engines, Role
from rlhf.engines.interface import Engine, PlainEngine, StepInfo, TrainingEngine
from rlhf.engines.single import SingleProcessEngine

__all__ = [
    "Engine",
    "Engines",
    "PlainEngine",
    "Role",
    "SingleProcessEngine",
    "StepInfo",
    "TrainingEngine",
]
