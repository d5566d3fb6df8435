"""Published configs by name, and some small shapes for benchmarks: no weights, no downloads."""

from __future__ import annotations

from typing import Any


def _opt(hidden: int, layers: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "model_type": "opt", "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "ffn_dim": 4 * hidden, "vocab_size": 50272,
        "max_position_embeddings": 2048, "word_embed_proj_dim": hidden, **more,
    }  # fmt: skip


def _llama(
    hidden: int, layers: int, heads: int, kv_heads: int, intermediate: int, vocab: int = 32000,
    *, positions: int = 4096, tied: bool = False, kind: str = "llama",
) -> dict[str, Any]:  # fmt: skip
    return {
        "model_type": kind, "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate, "vocab_size": vocab,
        "max_position_embeddings": positions, "tie_word_embeddings": tied,
    }  # fmt: skip


KNOWN: dict[str, dict[str, Any]] = {
    # For benchmarks on a CPU; 15M and 110M are the shapes of llama2.c's models.
    "tiny": _llama(192, 4, 6, 2, 512, 850, positions=512),
    "15M": _llama(288, 6, 6, 6, 768, positions=512, tied=True),
    "110M": _llama(768, 12, 12, 12, 2048, positions=1024, tied=True),
    # arXiv 2205.01068, table 1, and the configs on the Hugging Face hub.
    "opt-125m": _opt(768, 12, 12),
    "opt-350m": _opt(1024, 24, 16, word_embed_proj_dim=512, do_layer_norm_before=False),
    "opt-1.3b": _opt(2048, 24, 32),
    "opt-2.7b": _opt(2560, 32, 32),
    "opt-6.7b": _opt(4096, 32, 32),
    "opt-13b": _opt(5120, 40, 40),
    "opt-30b": _opt(7168, 48, 56),
    "opt-66b": _opt(9216, 64, 72),
    "opt-175b": _opt(12288, 96, 96),
    # arXiv 2307.09288, table 1, and 2407.21783, table 3.
    "llama-2-7b": _llama(4096, 32, 32, 32, 11008),
    "llama-2-13b": _llama(5120, 40, 40, 40, 13824),
    "llama-2-70b": _llama(8192, 80, 64, 8, 28672),
    "llama-3.2-1b": _llama(2048, 16, 32, 8, 8192, 128256, positions=131072, tied=True),
    "llama-3.2-3b": _llama(3072, 28, 24, 8, 8192, 128256, positions=131072, tied=True),
    "llama-3.1-8b": _llama(4096, 32, 32, 8, 14336, 128256, positions=131072),
    "llama-3.1-70b": _llama(8192, 80, 64, 8, 28672, 128256, positions=131072),
    "mistral-7b": _llama(4096, 32, 32, 8, 14336, positions=32768, kind="mistral"),
    "qwen2.5-0.5b": _llama(
        896, 24, 14, 2, 4864, 151936, positions=32768, tied=True, kind="qwen2"
    ),
    "qwen2.5-7b": _llama(3584, 28, 28, 4, 18944, 152064, positions=32768, kind="qwen2"),
}  # fmt: skip


def known_config(name: str) -> Any | None:
    """The Hugging Face config object of a known name, in any case of its letters, or None."""
    from transformers import AutoConfig

    by_lower = {known.lower(): options for known, options in KNOWN.items()}
    if (options := by_lower.get(name.lower())) is None:
        return None
    options = dict(options)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoConfig.for_model(options.pop("model_type"), **special, **options)
