"""Model families: where an HF model keeps what, and which maths it uses."""

from hybrid_engine.models.decoder import Decoder, DecoderBatch
from hybrid_engine.models.family import FAMILIES, Family, find_family

__all__ = ["FAMILIES", "Decoder", "DecoderBatch", "Family", "find_family"]
