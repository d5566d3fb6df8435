"""Folders and files that are either whole or not there."""

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
    replaced = path.with_name(f".{path.name}.{os.getpid()}.replaced")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    try:
        yield unfinished
        if path.is_dir():
            os.replace(path, replaced)  # at once; removing takes time, and could be interrupted
        os.replace(unfinished, path)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextlib.contextmanager
def finished_file(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` only when the block ends well."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """Write model and tokenizer as Hugging Face does, to be loaded by anyone.

    Raises OSError when the disk does not take it; nothing is left at `path` then.
    """
    saveable: Any = model
    with finished_directory(path) as folder, _io_errors(path):
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
