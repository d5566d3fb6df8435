"""How the decoder sees the live training parameters."""

from hybrid_engine.weights.by_head import RowsByHead, rows_by_head
from hybrid_engine.weights.fused import FusedParameters
from hybrid_engine.weights.gather import LayerStream, collect_only, fill
from hybrid_engine.weights.pieces import LowRank, Piece, Placement, Range, whole
from hybrid_engine.weights.shadow import Shadow
from hybrid_engine.weights.shards import ShardedParameters, sharded_parameters, whole_shape
from hybrid_engine.weights.unit import ShardedUnit, Unit, WholeUnit

__all__ = [
    "FusedParameters",
    "LayerStream",
    "LowRank",
    "Piece",
    "Placement",
    "Range",
    "RowsByHead",
    "Shadow",
    "ShardedParameters",
    "ShardedUnit",
    "Unit",
    "WholeUnit",
    "collect_only",
    "fill",
    "rows_by_head",
    "sharded_parameters",
    "whole",
    "whole_shape",
]
