"""A training model that generates by itself: fused kernels, paged cache, continuous batching."""

from hybrid_engine.accelerate import Acceleration, accelerate, acceleration, restore
from hybrid_engine.config import EngineConfig
from hybrid_engine.engine import HybridEngine
from hybrid_engine.generation import Rollout, SamplingParams, sequence_seeds
from hybrid_engine.speedup import measure_speedup

__all__ = [
    "Acceleration",
    "EngineConfig",
    "HybridEngine",
    "Rollout",
    "SamplingParams",
    "accelerate",
    "acceleration",
    "measure_speedup",
    "restore",
    "sequence_seeds",
]
