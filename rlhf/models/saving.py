"""Folders that are either whole or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase


@contextlib.contextmanager
def finished_directory(path: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `path` only when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        if path.exists():
            shutil.rmtree(path)
        os.replace(unfinished, path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write model and tokenizer as Hugging Face does, to be loaded by anyone."""
    saveable: Any = model
    with finished_directory(path) as folder:
        saveable.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
