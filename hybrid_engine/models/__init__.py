"""Model families: where an HF model keeps what, and which maths it uses."""

from hybrid_engine.models.decoder import Decoder, DecoderBatch, structure
from hybrid_engine.models.family import FAMILIES, Family, find_family
from hybrid_engine.models.parallel_decoder import ParallelDecoder
from hybrid_engine.models.program import DecodeProgram, why_not_native
from hybrid_engine.models.rollout_copy import Mode, RolloutCopy

__all__ = [
    "FAMILIES",
    "DecodeProgram",
    "Decoder",
    "DecoderBatch",
    "Family",
    "Mode",
    "ParallelDecoder",
    "RolloutCopy",
    "find_family",
    "structure",
    "why_not_native",
]
