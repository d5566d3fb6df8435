"""Where rows come from: the synthetic generator, local files and folders, the Hugging Face hub.

Whatever the source, the rows come back in the canonical form of `formats`, and the held-out side
is the source's own test split, or else the rows whose prompt falls into a fixed part of a hash.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from datasets import Dataset, Features, List, Value

from rlhf.data import arithmetic, synthetic
from rlhf.data.cache import cached, content_digest, map_rows
from rlhf.data.formats import (
    FORMATS,
    Purpose,
    Row,
    detect_format,
    prompt_text,
    to_demonstration,
    to_preference,
    to_prompt,
)
from rlhf.data.opening import open_sides
from rlhf.data.split import Share, Split, check_split, is_heldout, is_in_share

SYNTHETIC = "synthetic"
SYNTHETIC_ROWS: Mapping[Split, int] = {"train": 6000, "test": 500}  # unless max_rows says otherwise
_ROWS_AT_ONCE = 1000
_TYPES = {
    str: Value("string"),
    float: Value("float32"),
    list: List({"role": Value("string"), "content": Value("string")}),
}

_GENERATORS: Mapping[str, ModuleType] = {SYNTHETIC: synthetic, "arithmetic": arithmetic}
_CONVERTERS: Mapping[Purpose, Callable[[Row], Row | None]] = {
    "demonstrations": to_demonstration,
    "preferences": to_preference,
    "prompts": to_prompt,
}


def load_rows(
    name: str,
    *,
    purpose: Purpose,
    split: Split = "train",
    subset: str | None = None,
    splits: Mapping[Split, str] | None = None,
    columns: Mapping[str, str] | None = None,
    heldout_fraction: float = 0.05,
    share: Share = (0.0, 1.0),
    max_rows: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Load one side of a dataset as canonical rows for a purpose.

    Args:
        name: "synthetic", "arithmetic", a .json, .jsonl, .parquet or .arrow file, a folder, or a
            hub name;
            DeepSpeed-Chat's "local/jsonfile" is data/train.json and data/eval.json.
        purpose: "demonstrations", "preferences" or "prompts". Prompts keep the columns that are
            not part of the dialogue, for reward functions.
        split: "train" or "test". A source with a test or validation split of its own keeps it;
            else `heldout_fraction` of the prompts, chosen by a hash of their text, is "test".
        subset: configuration of a hub dataset, such as "main".
        splits: the source's names for the two, {"train": "train_prefs", "test": "test_prefs"}.
        columns: canonical name -> the dataset's name for it, {"prompt": "instruction"}.
        heldout_fraction: used only where the source has no held-out split.
        share: the part of the training prompts, in [0, 1), that this step gets: steps with disjoint
            shares have no prompt in common, whatever their datasets. Held-out rows are not divided.
        max_rows: at most so many rows; for "synthetic", how many to generate.
        seed: of the synthetic generator.

    Raises FileNotFoundError for a file or folder that is not there, and ValueError for a dataset
    that cannot be reached, has no rows, or lacks the columns.
    """
    check_split(split)
    if purpose not in _CONVERTERS:
        raise ValueError(f"unknown purpose {purpose!r}: choose one of {', '.join(_CONVERTERS)}")
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}")
    if name in _GENERATORS:
        rows = _generate(name, purpose, split, share, max_rows, seed)
    else:
        sides = open_sides(name, subset, splits or {})
        rows = _rename(sides.get(split, sides["train"]), columns or {}, name)
        try:
            rows = _canonical(rows, purpose, name)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name!r} is not UTF-8 text ({error.reason}): convert it, for example with iconv"
            ) from error
        if "test" not in sides:
            rows = _hold_out(rows, split, heldout_fraction, name)
    if split == "train" and share != (0.0, 1.0):
        rows = _divide(rows, share, name)
    return rows if max_rows is None else rows.select(range(min(max_rows, len(rows))))


def _generate(
    name: str, purpose: Purpose, split: Split, share: Share, max_rows: int | None, seed: int
) -> Dataset:
    """Synthetic rows, so many that about `max_rows` of them lie in the share."""
    n = SYNTHETIC_ROWS[split] if max_rows is None else max_rows
    if split == "train" and max_rows is not None:
        n = math.ceil(n / max(share[1] - share[0], 1e-3))
    return Dataset.from_list(getattr(_GENERATORS[name], purpose)(n, split, seed=seed))


def _rename(rows: Dataset, columns: Mapping[str, str], name: str) -> Dataset:
    """Give the columns their canonical names."""
    missing = sorted(set(columns.values()) - set(rows.column_names))
    if missing:
        raise ValueError(
            f"{name!r} has no column {', '.join(missing)}, which the column mapping names; it has"
            f" {', '.join(sorted(rows.column_names))}"
        )
    for canonical, found in columns.items():
        if canonical != found:
            if canonical in rows.column_names:
                rows = rows.remove_columns(canonical)
            rows = rows.rename_column(found, canonical)
    return rows


def _canonical(rows: Dataset, purpose: Purpose, name: str) -> Dataset:
    """Bring all rows into canonical form; rows with nothing in them are dropped and counted."""
    if len(rows) == 0:
        raise ValueError(f"{name!r} has no rows")
    form = detect_format(rows.column_names, purpose=purpose)
    consumed = {*FORMATS[form], "chosen", "rejected", "messages"} - {"answer", "completion"}
    extra = [c for c in rows.column_names if c not in consumed] if purpose == "prompts" else []

    def convert(number: int, row: Row) -> Row | None:
        try:
            return _CONVERTERS[purpose](row)
        except ValueError as error:
            raise ValueError(f"{name!r}, row {number}: {error}") from error

    first = next((row for row in itertools.starmap(convert, enumerate(rows, 1)) if row), None)
    if first is None:
        raise ValueError(
            f"{name!r} has nothing to learn from: in all its {len(rows)} rows the prompt or the"
            " completion is empty, or the two completions are the same or have no common beginning"
            " that could be their prompt"
        )
    features = Features({column: rows.features[column] for column in extra})
    for column, cell in first.items():
        features[column] = _TYPES[type(cell)]
    dropped: Counter[str] = Counter()
    numbers = itertools.count(1)

    def convert_batch(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        converted: list[Row] = []
        for cells in zip(*batch.values(), strict=True):
            row = dict(zip(batch, cells, strict=True))
            canonical = convert(next(numbers), row)
            if canonical is None:
                dropped["rows"] += 1
            else:
                converted.append({**row, **canonical})
        return {column: [row[column] for row in converted] for column in features}

    def build(folder: Path) -> tuple[Dataset, str]:
        result = map_rows(rows, convert_batch, features, folder, batch_size=_ROWS_AT_ONCE)
        if not dropped["rows"]:
            return result, ""
        return result, (
            f"{name}: dropped {dropped['rows']} of {len(rows)} rows with an empty prompt or"
            " completion, or two equal ones"
        )

    parts = {"rows": content_digest(rows), "columns": str(features), "name": name}
    return cached(f"canonical-{purpose}", parts, build)


def _hold_out(rows: Dataset, split: Split, fraction: float, name: str) -> Dataset:
    """Keep the rows whose prompt the hash puts on the wanted side."""
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"heldout_fraction must be between 0 and 1, got {fraction}")
    kept = [
        i
        for i, row in enumerate(rows)
        if is_heldout(prompt_text(row), fraction) == (split == "test")
    ]
    if not kept:
        prompts = len({prompt_text(row) for row in rows})
        raise ValueError(
            f"no row of {name!r} falls into its {split} side: {len(rows)} rows with {prompts}"
            f" different prompts are too few to hold out {fraction:.0%}; raise heldout_fraction"
            " or give a dataset with a test split"
        )
    return rows.select(kept)


def _divide(rows: Dataset, share: Share, name: str) -> Dataset:
    """Keep the rows whose prompt the hash puts into the share."""
    kept = [i for i, row in enumerate(rows) if is_in_share(prompt_text(row), share)]
    if not kept:
        raise ValueError(
            f"data_split leaves no row of {name!r} to this step: its share is"
            f" {share[1] - share[0]:.0%} of {len(rows)} rows; give it more, or more data"
        )
    return rows.select(kept)
