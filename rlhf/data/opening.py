"""Open what a name means: a file, a folder, a saved dataset, a dataset of the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets import (
    Dataset,
    DatasetDict,
    IterableDataset,
    IterableDatasetDict,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetsError

from rlhf.data.cache import file_digest
from rlhf.data.names import first_line, looks_local, missing_path
from rlhf.data.split import Split

DEEPSPEED_CHAT_FILES = "local/jsonfile"
_DEEPSPEED_CHAT_SIDES = {"train": Path("data/train.json"), "test": Path("data/eval.json")}
_HELDOUT_SPLITS = ("test", "validation", "valid", "eval", "dev")
_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow"}


def open_sides(name: str, subset: str | None, splits: Mapping[Split, str]) -> dict[str, Dataset]:
    """The raw rows under "train" and, if the source holds some out itself, under "test"."""
    return _sides(_open(name, subset), splits, name)


def _open(name: str, subset: str | None) -> DatasetDict:
    """Open every split of a local or hub dataset."""
    path = Path(name).expanduser()
    if name == DEEPSPEED_CHAT_FILES and not path.exists():
        return _open_deepspeed_chat_files()
    if path.is_file():
        if path.suffix not in _READERS:
            raise ValueError(
                f"cannot read {name!r}: known file types are {', '.join(_READERS)}, or a folder"
            )
        if not path.stat().st_size:
            raise ValueError(f"{name!r} has no rows: the file is empty")
        return _load_files(name, "this file", _READERS[path.suffix], {"train": path})
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return _as_splits(load_from_disk(str(path)))
        found = sorted(file for file in path.rglob("*") if file.is_file())
        cache = _cache_of(*found)
        return _load(name, "the data files of this folder", str(path), cache_dir=cache)
    if looks_local(name, suffixes=tuple(_READERS)):
        raise missing_path(
            name,
            "Give a .json, .jsonl, .parquet or .arrow file, a folder, a hub name such as"
            ' "openai/gsm8k", or "synthetic"',
        )
    return _load(name, "the Hugging Face hub and its local cache", name, subset)


def _open_deepspeed_chat_files() -> DatasetDict:
    """What DeepSpeed-Chat calls local/jsonfile: two files beside where it was started."""
    missing = [str(file) for file in _DEEPSPEED_CHAT_SIDES.values() if not file.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{DEEPSPEED_CHAT_FILES} means data/train.json and data/eval.json in the working"
            f" folder, {Path.cwd()}: there is no {' and no '.join(missing)}"
        )
    return _load_files(DEEPSPEED_CHAT_FILES, "these files", "json", _DEEPSPEED_CHAT_SIDES)


def _load_files(name: str, tried: str, reader: str, sides: Mapping[str, Path]) -> DatasetDict:
    files = {side: str(path) for side, path in sides.items()}
    return _load(name, tried, reader, data_files=files, cache_dir=_cache_of(*sides.values()))


def _cache_of(*files: Path) -> str:
    """A folder for the rows of files with this very content.

    `datasets` would know files by their times of change, and take an edited one for the old.
    """
    return str(Path(datasets.config.HF_DATASETS_CACHE) / "rlhf" / f"files-{file_digest(*files)}")


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
