"""Models on disk, in Hugging Face's format."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf.files import finished_directory
from rlhf.models.lora import has_adapters, merged_state_dict, save_adapters


def save_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, path: Path, *, base: str | None = None
) -> None:
    """Write model and tokenizer as Hugging Face does, to be loaded by anyone.

    A model with adapters is written with the adapters added to its weights, and beside it in
    `adapter/` the adapters alone, for the model `base` that they were trained on.

    Raises OSError when the disk does not take it; nothing is left at `path` then.
    """
    saveable: Any = model
    with finished_directory(path) as folder, _io_errors(path):
        if has_adapters(model):
            saveable.save_pretrained(folder, state_dict=merged_state_dict(model))
            save_adapters(model, folder / "adapter", base=base or saveable.config.name_or_path)
        else:
            saveable.save_pretrained(folder)
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
