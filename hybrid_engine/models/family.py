"""One table per model family. To add one, add a row and its configs to the greedy tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn


def _supported(config: Any) -> str | None:
    return None


def _no_window(config: Any, layer: int) -> int:
    return 0


@dataclass(frozen=True)
class Family:
    """Paths of modules: from the model, and within one layer. Biases are used where they exist."""

    model_type: str  # HF's config.model_type
    # from the causal language model
    embedding: str
    layers: str
    final_norm: str
    # within a layer
    attention_norm: str
    qkv: tuple[str, ...]  # three modules, or one with all rows
    attention_output: str
    mlp_norm: str
    mlp_up: tuple[str, ...]  # (gate, up), or one module
    mlp_down: str
    # maths
    norm: Literal["rms", "layer"]
    activation: Callable[[Any], str]  # its name, from the config
    # where the family has them
    norm_weight_offset: float = 0.0
    embedding_norm: str | None = None
    embedding_scales: bool = False  # its module multiplies by its embed_scale
    query_norm: str | None = None  # within a layer: RMSNorm of each query head
    key_norm: str | None = None
    attention_output_norm: str | None = None  # within a layer: before the residual addition
    mlp_output_norm: str | None = None
    qkv_rows_by_head: bool = False  # one module with rows [head, (q, k, v), head_dim]
    parallel_residual: Callable[[Any], bool] | None = None  # attention and MLP read the same input
    rotary: str | None = None  # the module that gives cosines and sines
    position_embedding: str | None = None  # learned positions
    position_offset: int = 0  # rows of the position embedding before position 0
    alibi: bool = False
    window: Callable[[Any, int], int] = _no_window  # keys that layer i sees; 0: all
    query_scalar: Callable[[Any], float] | None = None  # scale = this ** -0.5; default: head_dim
    unsupported: Callable[[Any], str | None] = _supported  # why a config is not served


def _sliding_layers(config: Any, layer: int) -> int:
    """The window of a layer, where the config lists which layers slide."""
    types = getattr(config, "layer_types", None)
    slides = types is None or types[layer] == "sliding_attention"
    return (config.sliding_window or 0) if slides else 0


def _unsupported_rotary(config: Any) -> str | None:
    if (config.rope_parameters or {}).get("rope_type") == "longrope":
        return "its rotary frequencies change with the sequence's length (longrope)"
    return None


def _unsupported_opt(config: Any) -> str | None:
    if not config.do_layer_norm_before:
        return "it normalises after the residual addition (do_layer_norm_before=False)"
    if config.word_embed_proj_dim != config.hidden_size:
        return "its embedding is narrower than its layers (word_embed_proj_dim)"
    if config._remove_final_layer_norm:
        return "it has no norm after its last layer (_remove_final_layer_norm)"
    if not config.layer_norm_elementwise_affine:
        return "its norms have no weights (layer_norm_elementwise_affine=False)"
    return None


def _unsupported_gpt2(config: Any) -> str | None:
    if not config.scale_attn_weights or config.scale_attn_by_inverse_layer_idx:
        return "its attention scale depends on the layer (scale_attn_by_inverse_layer_idx)"
    if config.add_cross_attention:
        return "it attends to an encoder (add_cross_attention)"
    return None


def _unsupported_bloom(config: Any) -> str | None:
    if config.apply_residual_connection_post_layernorm:
        return "its residual starts after the norm (apply_residual_connection_post_layernorm)"
    return None


LLAMA = Family(
    model_type="llama",
    embedding="model.embed_tokens",
    layers="model.layers",
    final_norm="model.norm",
    attention_norm="input_layernorm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_output="self_attn.o_proj",
    mlp_norm="post_attention_layernorm",
    mlp_up=("mlp.gate_proj", "mlp.up_proj"),
    mlp_down="mlp.down_proj",
    norm="rms",
    activation=lambda config: config.hidden_act,
    rotary="model.rotary_emb",
    unsupported=_unsupported_rotary,
)

MISTRAL = dataclasses.replace(LLAMA, model_type="mistral", window=_sliding_layers)

QWEN2 = dataclasses.replace(LLAMA, model_type="qwen2", window=_sliding_layers)

QWEN3 = dataclasses.replace(
    QWEN2, model_type="qwen3", query_norm="self_attn.q_norm", key_norm="self_attn.k_norm"
)

GEMMA2 = dataclasses.replace(
    LLAMA,
    model_type="gemma2",
    attention_output_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_output_norm="post_feedforward_layernorm",
    norm_weight_offset=1.0,
    activation=lambda config: config.hidden_activation,
    embedding_scales=True,
    window=_sliding_layers,
    query_scalar=lambda config: config.query_pre_attn_scalar,
)

OPT = Family(
    model_type="opt",
    embedding="model.decoder.embed_tokens",
    layers="model.decoder.layers",
    final_norm="model.decoder.final_layer_norm",
    attention_norm="self_attn_layer_norm",
    qkv=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    attention_output="self_attn.out_proj",
    mlp_norm="final_layer_norm",
    mlp_up=("fc1",),
    mlp_down="fc2",
    norm="layer",
    activation=lambda config: config.activation_function,
    position_embedding="model.decoder.embed_positions",
    position_offset=2,
    unsupported=_unsupported_opt,
)

GPT2 = Family(
    model_type="gpt2",
    embedding="transformer.wte",
    layers="transformer.h",
    final_norm="transformer.ln_f",
    attention_norm="ln_1",
    qkv=("attn.c_attn",),
    attention_output="attn.c_proj",
    mlp_norm="ln_2",
    mlp_up=("mlp.c_fc",),
    mlp_down="mlp.c_proj",
    norm="layer",
    activation=lambda config: config.activation_function,
    position_embedding="transformer.wpe",
    unsupported=_unsupported_gpt2,
)

GPT_NEOX = Family(
    model_type="gpt_neox",
    embedding="gpt_neox.embed_in",
    layers="gpt_neox.layers",
    final_norm="gpt_neox.final_layer_norm",
    attention_norm="input_layernorm",
    qkv=("attention.query_key_value",),
    qkv_rows_by_head=True,
    attention_output="attention.dense",
    mlp_norm="post_attention_layernorm",
    mlp_up=("mlp.dense_h_to_4h",),
    mlp_down="mlp.dense_4h_to_h",
    norm="layer",
    activation=lambda config: config.hidden_act,
    parallel_residual=lambda config: config.use_parallel_residual,
    rotary="gpt_neox.rotary_emb",
    unsupported=_unsupported_rotary,
)

BLOOM = Family(
    model_type="bloom",
    embedding="transformer.word_embeddings",
    embedding_norm="transformer.word_embeddings_layernorm",
    layers="transformer.h",
    final_norm="transformer.ln_f",
    attention_norm="input_layernorm",
    qkv=("self_attention.query_key_value",),
    qkv_rows_by_head=True,
    attention_output="self_attention.dense",
    mlp_norm="post_attention_layernorm",
    mlp_up=("mlp.dense_h_to_4h",),
    mlp_down="mlp.dense_4h_to_h",
    norm="layer",
    activation=lambda config: "gelu_pytorch_tanh",
    alibi=True,
    unsupported=_unsupported_bloom,
)

FAMILIES = {
    family.model_type: family
    for family in (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, OPT, GPT2, GPT_NEOX, BLOOM)
}


def find_family(model: nn.Module) -> Family:
    """The family of an HF causal language model.

    Raises ValueError when there is none, naming the ones there are.
    """
    config = getattr(model, "config", None)
    model_type = getattr(config, "model_type", type(model).__name__)
    family = FAMILIES.get(model_type)
    if family is None:
        known = ", ".join(sorted(FAMILIES))
        raise ValueError(
            f"the hybrid engine does not know the model family {model_type!r}; it knows {known}"
        )
    if reason := family.unsupported(config):
        raise ValueError(f"the hybrid engine does not serve this {model_type} model: {reason}")
    if model.get_output_embeddings() is None:  # type: ignore[operator]
        raise ValueError(
            f"the hybrid engine generates with a causal language model; {type(model).__name__} "
            "has no language-model head"
        )
    return family
