"""Prepared rows on disk, memory-mapped, under a name that says everything they depend on.

The name is a hash of the content of the rows, of the tokenizer (its vocabulary, special tokens and
chat template), of the limits, and of the code that prepares them. So nothing stale is ever read:
what changed has another name. Files of the user's are read in the same way, by their bytes and not
by the time of their last change.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow
import tokenizers
from datasets import Dataset, Features, load_from_disk
from filelock import FileLock
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf.files import finished_directory

logger = logging.getLogger(__name__)

_CODE = ("cache", "encoding", "formats", "rendering")  # of this package: what rows are made by
_ROWS_AT_ONCE = 1000
_BYTES_AT_ONCE = 1 << 22


def cached(
    kind: str, parts: dict[str, Any], build: Callable[[Path], tuple[Dataset, str]]
) -> Dataset:
    """Rows from the cache, else from `build`; processes that want the same rows wait for one.

    Args:
        kind: the beginning of the name, for people.
        parts: all that the rows depend on besides this package's code, as JSON can write it.
        build: is given a folder for temporary files, named by the hash; returns the rows, and what
            to warn of, or "". The warning is repeated whenever the rows come from the cache.
    """
    root = Path(datasets.config.HF_DATASETS_CACHE) / "rlhf"
    root.mkdir(parents=True, exist_ok=True)
    name = _digest_of(json.dumps([_code_digest(), parts], sort_keys=True))
    path = root / f"{kind}-{name}"
    with FileLock(f"{path}.lock"):
        if not (path / "state.json").exists():
            with finished_directory(path) as folder:
                (folder / name).mkdir()
                rows, warning = build(folder / name)
                rows.save_to_disk(str(folder))
                (folder / "warning").write_text(warning)
                shutil.rmtree(folder / name)
    if warning := (path / "warning").read_text():
        logger.warning("%s", warning)
    return load_from_disk(str(path))


def map_rows(
    rows: Dataset,
    function: Callable[[dict[str, list[Any]]], dict[str, list[Any]]],
    features: Features,
    folder: Path,
    *,
    batch_size: int,
) -> Dataset:
    """Apply a function to batches of columns, in the folder that `cached` gives to `build`."""
    return rows.map(
        function,
        batched=True,
        batch_size=batch_size,
        remove_columns=rows.column_names,
        features=features,
        cache_file_name=str(folder / "rows.arrow"),
        load_from_cache_file=False,
        new_fingerprint=folder.name,
    )


def content_digest(rows: Dataset) -> str:
    """A hash of column names, types and every cell."""
    digest = hashlib.blake2b(str(rows.features).encode(), digest_size=16)
    for batch in rows.with_format("arrow").iter(_ROWS_AT_ONCE):
        table = cast(pyarrow.Table, batch).combine_chunks()
        serialised = pyarrow.BufferOutputStream()
        with pyarrow.ipc.new_stream(serialised, table.schema) as stream:
            stream.write_table(table)
        digest.update(serialised.getvalue())
    return digest.hexdigest()


def file_digest(*paths: Path) -> str:
    """A hash of the names and bytes of files."""
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while piece := file.read(_BYTES_AT_ONCE):
                digest.update(piece)
    return digest.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides the ids: vocabulary and rules, special tokens, chat template.

    A short dialogue is rendered too: some templates write today's date.
    """
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        rules = tokenizer.backend_tokenizer.to_str()
    else:
        rules = json.dumps([type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())])
    special = [str(tokenizer.special_tokens_map), tokenizer.eos_token_id, tokenizer.bos_token_id]
    beginning = tokenizer("a")["input_ids"]
    template = [tokenizer.chat_template, _rendered(tokenizer)]
    return _digest_of(json.dumps([tokenizers.__version__, rules, special, beginning, template]))


def _rendered(tokenizer: PreTrainedTokenizerBase) -> str:
    try:
        dialogue = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        return str(tokenizer.apply_chat_template(dialogue, tokenize=False))
    except (TemplateError, ValueError):  # the error comes, with its row, where rows are rendered
        return ""


def _code_digest() -> str:
    folder = Path(__file__).parent
    return file_digest(*(folder / f"{name}.py" for name in _CODE))


def _digest_of(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
