"""How the decoder sees the live training parameters."""

from hybrid_engine.weights.fused import FusedParameters

__all__ = ["FusedParameters"]
