"""Sampling, continuous batching and the generate loop."""

from hybrid_engine.generation.loop import GenerationLoop
from hybrid_engine.generation.params import Rollout, SamplingParams
from hybrid_engine.generation.seeds import sequence_seeds

__all__ = ["GenerationLoop", "Rollout", "SamplingParams", "sequence_seeds"]
