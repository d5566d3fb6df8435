"""How the decoder sees the live training parameters."""

from hybrid_engine.weights.by_head import RowsByHead, rows_by_head
from hybrid_engine.weights.fused import FusedParameters
from hybrid_engine.weights.shadow import Shadow

__all__ = ["FusedParameters", "RowsByHead", "Shadow", "rows_by_head"]
