"""Where rows come from: the synthetic generator, local files and folders, the Hugging Face hub.

Whatever the source, the rows come back in the canonical form of `formats`, and the held-out side
is the source's own test split, or else the rows whose prompt falls into a fixed part of a hash.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    IterableDatasetDict,
    List,
    Value,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetsError

from rlhf.data import synthetic
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
from rlhf.data.names import first_line, looks_local, missing_path
from rlhf.data.split import Split, check_split, is_heldout

logger = logging.getLogger(__name__)

SYNTHETIC = "synthetic"
SYNTHETIC_ROWS: Mapping[Split, int] = {"train": 6000, "test": 500}  # unless max_rows says otherwise
_HELDOUT_SPLITS = ("test", "validation", "valid", "eval", "dev")
_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}

_DIALOGUE = List({"role": Value("string"), "content": Value("string")})

_GENERATORS: Mapping[Purpose, Callable[..., list[Row]]] = {
    "demonstrations": synthetic.demonstrations,
    "preferences": synthetic.preferences,
    "prompts": synthetic.prompts,
}
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
    max_rows: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Load one side of a dataset as canonical rows for a purpose.

    Args:
        name: "synthetic", a .json, .jsonl, .parquet or .arrow file, a folder, or a hub name.
        purpose: "demonstrations", "preferences" or "prompts". Prompts keep the columns that are
            not part of the dialogue, for reward functions.
        split: "train" or "test". A source with a test or validation split of its own keeps it;
            else `heldout_fraction` of the prompts, chosen by a hash of their text, is "test".
        subset: configuration of a hub dataset, such as "main".
        splits: the source's names for the two, {"train": "train_prefs", "test": "test_prefs"}.
        columns: canonical name -> the dataset's name for it, {"prompt": "instruction"}.
        heldout_fraction: used only where the source has no held-out split.
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
    if name == SYNTHETIC:
        n = SYNTHETIC_ROWS[split] if max_rows is None else max_rows
        return Dataset.from_list(_GENERATORS[purpose](n, split, seed=seed))
    sides = _sides(_open(name, subset), splits or {}, name)
    rows = _rename(sides.get(split, sides["train"]), columns or {}, name)
    rows = _canonical(rows, purpose, name)
    if "test" not in sides:
        rows = _hold_out(rows, split, heldout_fraction, name)
    return rows if max_rows is None else rows.select(range(min(max_rows, len(rows))))


def _open(name: str, subset: str | None) -> DatasetDict:
    """Open every split of a local or hub dataset."""
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix not in _READERS:
            raise ValueError(
                f"cannot read {name!r}: known file types are {', '.join(_READERS)}, or a folder"
            )
        if not path.stat().st_size:
            raise ValueError(f"{name!r} has no rows: the file is empty")
        return _load(name, "this file", _READERS[path.suffix], data_files={"train": str(path)})
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return _as_splits(load_from_disk(str(path)))
        return _load(name, "the data files of this folder", str(path))
    if looks_local(name, suffixes=tuple(_READERS)):
        raise missing_path(
            name,
            "Give a .json, .jsonl, .parquet or .arrow file, a folder, a hub name such as"
            ' "openai/gsm8k", or "synthetic"',
        )
    return _load(name, "the Hugging Face hub and its local cache", name, subset)


def _load(name: str, tried: str, *args: Any, **options: Any) -> DatasetDict:
    """Call datasets.load_dataset and turn its failures into one clear error."""
    try:
        return _as_splits(load_dataset(*args, **options))
    except (DatasetsError, OSError, ValueError) as error:
        cause = first_line(error.__cause__ or error)
        advice = (
            "There is no local file or folder of this name: check the name and the network"
            if "hub" in tried
            else "Is it empty, or not in the format that its name says?"
        )
        raise ValueError(f"cannot load {name!r}; tried {tried}: {cause}. {advice}") from error


def _sides(found: DatasetDict, splits: Mapping[Split, str], name: str) -> dict[str, Dataset]:
    """Find out which of the source's splits is "train" and which, if any, is "test"."""
    missing = sorted(set(splits.values()) - set(found))
    if missing:
        raise ValueError(
            f"{name!r} has no split {', '.join(missing)}; it has {', '.join(sorted(found))}"
        )
    test = splits.get("test") or next((s for s in _HELDOUT_SPLITS if s in found), None)
    others = [s for s in found if s not in _HELDOUT_SPLITS] or list(found)
    train = splits.get("train") or ("train" if "train" in found else others[0])
    if len(others) > 1 and train != "train" and "train" not in splits:
        raise ValueError(
            f"{name!r} has the splits {', '.join(sorted(found))}: say which to take with"
            ' splits={"train": ..., "test": ...}'
        )
    if test is None or test == train:
        return {"train": found[train]}
    return {"train": found[train], "test": found[test]}


def _as_splits(
    loaded: Dataset | DatasetDict | IterableDataset | IterableDatasetDict,
) -> DatasetDict:
    if isinstance(loaded, Dataset):
        return DatasetDict({"train": loaded})
    assert isinstance(loaded, DatasetDict)
    return loaded


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
    convert = _CONVERTERS[purpose]
    first = next((row for row in map(convert, rows) if row is not None), None)
    if first is None:
        raise ValueError(
            f"{name!r} has nothing to learn from: in all its {len(rows)} rows the prompt or the"
            " completion is empty, or the two completions are the same"
        )
    features = Features({column: rows.features[column] for column in extra})
    for column, cell in first.items():
        features[column] = Value("string") if isinstance(cell, str) else _DIALOGUE
    dropped: Counter[str] = Counter()

    def convert_batch(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        converted: list[Row] = []
        for cells in zip(*batch.values(), strict=True):
            row = dict(zip(batch, cells, strict=True))
            canonical = convert(row)
            if canonical is None:
                dropped["rows"] += 1
            else:
                converted.append({**row, **canonical})
        return {column: [row[column] for row in converted] for column in features}

    result = rows.map(
        convert_batch,
        batched=True,
        remove_columns=rows.column_names,
        features=features,
        load_from_cache_file=False,
        desc=f"read {purpose}",
    )
    if dropped["rows"]:
        logger.warning(
            "%s: dropped %d of %d rows with an empty prompt or completion, or two equal ones",
            name,
            dropped["rows"],
            len(rows),
        )
    return result


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
        raise ValueError(
            f"no row of {name!r} falls into its {split} side: {len(rows)} rows are too few to hold"
            f" out {fraction:.0%}; raise heldout_fraction or give a dataset with a test split"
        )
    return rows.select(kept)
