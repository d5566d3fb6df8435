"""The shape of a model, from its Hugging Face config: what memory and time depend on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.plan.known import KNOWN, known_config

GATED = {"llama", "mistral", "qwen2", "qwen3", "gemma2"}
LEARNED_POSITIONS = {"opt": 2, "gpt2": 0}  # model_type -> rows beyond max_position_embeddings
BIASED = {"opt", "gpt2", "gpt_neox", "bloom"}


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a decoder-only transformer."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    gated: bool = False  # MLP of three matrices, not two
    tied: bool = True  # the output projection is the embedding
    biased: bool = False
    positions: int = 0  # rows of a learned position embedding
    embed_dim: int | None = None  # of the embedding, where a projection follows it

    @property
    def layer_matrices(self) -> int:
        """Elements of one layer's matrices: what a token is multiplied with."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + (3 if self.gated else 2) * self.hidden * self.intermediate

    @property
    def layer_parameters(self) -> int:
        norms = 2 * self.hidden * (2 if self.biased else 1)
        if not self.biased:
            return self.layer_matrices + norms
        attention = self.head_dim * (self.heads + 2 * self.kv_heads) + self.hidden
        return self.layer_matrices + norms + attention + self.intermediate + self.hidden

    @property
    def parameters(self) -> int:
        """All parameters, tied ones once."""
        width = self.embed_dim or self.hidden
        embedding = self.vocab * width * (1 if self.tied else 2)
        projections = 2 * width * self.hidden if width != self.hidden else 0
        final_norm = 0 if projections else self.hidden * (2 if self.biased else 1)
        rest = embedding + projections + self.positions * self.hidden + final_norm
        return self.layers * self.layer_parameters + rest

    @property
    def kv_elements(self) -> int:
        """Elements of K and V that one token leaves in the cache."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    def forward_flops(self, tokens: int, *, logits: bool = True) -> float:
        """Of one sequence of `tokens`, causal: matrices, attention and, if asked, the logits."""
        matrices = 2.0 * self.layers * self.layer_matrices * tokens
        attention = 2.0 * self.layers * self.heads * self.head_dim * tokens**2
        return matrices + attention + (2.0 * self.vocab * self.hidden * tokens if logits else 0.0)

    def published_flops(self, tokens: int) -> float:
        """One forward pass of one sequence as arXiv 2104.04473, eq. 3 counts it (a quarter of it).

        Attention in full, not causal; the formula is for an MLP of four times the hidden size.
        """
        s, L, h, V = tokens, self.layers, self.hidden, self.vocab
        return 24.0 * s * L * h**2 * (1 + s / (6 * h) + V / (16 * L * h))


def from_config(config: Any, name: str = "") -> ModelShape:
    """The shape of a Hugging Face config object. Raises ValueError where it has no such sizes."""

    def read(*names: str, default: Any = None) -> Any:
        for option in names:
            if (value := getattr(config, option, None)) is not None:
                return value
        if default is None:
            raise ValueError(f"{name or config.model_type}: its config has no {names[0]}")
        return default

    kind = config.model_type
    hidden = read("hidden_size", "n_embd")
    heads = read("num_attention_heads", "n_head")
    extra = LEARNED_POSITIONS.get(kind)
    return ModelShape(
        name=name or kind,
        layers=read("num_hidden_layers", "n_layer"),
        hidden=hidden,
        heads=heads,
        kv_heads=read("num_key_value_heads", default=heads),
        head_dim=read("head_dim", default=hidden // heads),
        intermediate=read("intermediate_size", "ffn_dim", "n_inner", default=4 * hidden),
        vocab=read("vocab_size"),
        gated=kind in GATED,
        tied=bool(config.tie_word_embeddings),
        biased=kind in BIASED,
        positions=0 if extra is None else read("max_position_embeddings") + extra,
        embed_dim=getattr(config, "word_embed_proj_dim", None),
    )


def find_shape(model: str) -> ModelShape:
    """The shape of a known name, or of a folder or file with a Hugging Face config."""
    if (config := known_config(model)) is not None:
        return from_config(config, model.lower())
    path = Path(model)
    if not path.exists():
        raise ValueError(
            f"no model {model!r}: give a folder, a config.json, or one of {', '.join(KNOWN)}"
        )
    from transformers import AutoConfig

    name = path.parent.name if path.is_file() else path.name
    return from_config(AutoConfig.from_pretrained(path), name)
