"""Models on disk, in Hugging Face's format."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.files import finished_directory
from rlhf.models.lora import has_adapters, merged_state_dict, save_adapters

MAX_SHARD = "5GB"  # of a safetensors file


def save_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    base: str | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write model and tokenizer as Hugging Face does, to be loaded by anyone.

    A model with adapters is written with the adapters added to its weights, and beside it in
    `adapter/` the adapters alone, for the model `base` that they were trained on.

    Args:
        weights: the state_dict to write; default: the model's own.

    Raises OSError when the disk does not take it; nothing is left at `path` then.
    """
    saveable: Any = model
    weights = dict(model.state_dict() if weights is None else weights)
    whole = merged_state_dict(model, weights) if has_adapters(model) else weights
    with finished_directory(path) as folder, _io_errors(path):
        saveable.save_pretrained(folder, state_dict=whole, max_shard_size=MAX_SHARD)
        if has_adapters(model):
            base = base or saveable.config.name_or_path
            save_adapters(model, weights, folder / "adapter", base=str(base))
        tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def _io_errors(path: Path) -> Iterator[None]:
    """safetensors and tokenizers, which are Rust, raise other exceptions on a full disk."""
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) or "os error" not in str(error):
            raise
        raise OSError(f"cannot write {path}: {error}") from error
