"""The fused ops. Each has a naive PyTorch reference; native kernels override it when they load."""

from hybrid_engine.ops import native, triton
from hybrid_engine.ops.activation import bias_gelu, gelu_and_mul, relu, silu_and_mul
from hybrid_engine.ops.advantage import gae, masked_moments, masked_whiten
from hybrid_engine.ops.attention import decode_attention, prefill_attention
from hybrid_engine.ops.gather import UnpackEntry, gather_unpack, unpack_plan
from hybrid_engine.ops.linear import fused_lora, skinny_linear
from hybrid_engine.ops.logprob import linear_logprob
from hybrid_engine.ops.norm import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from hybrid_engine.ops.registry import OPS
from hybrid_engine.ops.rope import rope, rope_and_store_kv
from hybrid_engine.ops.sampling import sample
from hybrid_engine.ops.swiglu import swiglu

NATIVE = native.load()
TRITON = triton.load()

__all__ = [
    "NATIVE",
    "OPS",
    "TRITON",
    "UnpackEntry",
    "add_layer_norm",
    "add_rms_norm",
    "bias_gelu",
    "decode_attention",
    "fused_lora",
    "gae",
    "gather_unpack",
    "gelu_and_mul",
    "layer_norm",
    "linear_logprob",
    "masked_moments",
    "masked_whiten",
    "prefill_attention",
    "relu",
    "rms_norm",
    "rope",
    "rope_and_store_kv",
    "sample",
    "silu_and_mul",
    "skinny_linear",
    "swiglu",
    "unpack_plan",
]
