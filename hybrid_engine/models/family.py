"""One table per model family. To add one, add a row and a line to the family tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn


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
    qkv: tuple[str, str, str]
    attention_output: str
    mlp_norm: str
    mlp_up: tuple[str, ...]  # (gate, up), or one module
    mlp_down: str
    # maths
    norm: Literal["rms", "layer"]
    activation: str  # the config's field
    rotary: str | None = None  # the module that gives cosines and sines
    position_embedding: str | None = None  # learned positions
    position_offset: int = 0  # rows of the position embedding before position 0
    unsupported: Callable[[Any], str | None] = lambda config: None  # why a config is not served


def _unsupported_llama(config: Any) -> str | None:
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
    activation="hidden_act",
    rotary="model.rotary_emb",
    unsupported=_unsupported_llama,
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
    activation="activation_function",
    position_embedding="model.decoder.embed_positions",
    position_offset=2,
    unsupported=_unsupported_opt,
)

FAMILIES = {family.model_type: family for family in (LLAMA, OPT)}


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
