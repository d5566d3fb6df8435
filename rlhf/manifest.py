"""Folders that several ranks write together, and that are either whole or not there.

Every rank writes its part into `NAME.unfinished`; when all parts are on the disk the first rank
writes a manifest of them and renames the folder. So whatever is killed, and whenever, each folder
without a suffix is whole; what happened to it since, the manifest tells.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf import distributed

MANIFEST = "manifest.json"


@contextlib.contextmanager
def written_together(final: Path, *parts: str, **record: Any) -> Iterator[Path]:
    """A folder to write into, with a folder for each of `parts`; at the end it becomes `final`.

    All ranks enter together. `record` goes into the manifest. Raises OSError for a full disk.
    """
    unfinished = final.with_suffix(".unfinished")
    if distributed.is_first():
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for name in parts:
            (unfinished / name).mkdir()
    distributed.barrier()
    with _full_disk_is_an_os_error(unfinished):
        yield unfinished
    distributed.barrier()
    _sync_files(unfinished)
    distributed.barrier()
    if distributed.is_first():
        _finish(unfinished, final, record)
    distributed.barrier()


def _finish(unfinished: Path, final: Path, record: dict[str, Any]) -> None:
    files = {
        str(path.relative_to(unfinished)): path.stat().st_size
        for path in sorted(unfinished.rglob("*"))
        if path.is_file()
    }
    manifest = {**record, "ranks": distributed.world_size(), "files": files}
    (unfinished / MANIFEST).write_text(json.dumps(manifest, indent=1))
    _sync_files(unfinished)
    if final.exists():  # of the run that this one resumed from an earlier step
        remove(final)
    os.replace(unfinished, final)
    _sync(final.parent)


def read_manifest(folder: Path, *, advice: str) -> dict[str, Any]:
    """The manifest of a folder whose files are as they were written.

    Raises ValueError, with the advice on what to do, where they are not.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        step, files = int(manifest["step"]), manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} is no checkpoint of rlhf ({error}); {advice}") from error
    for name, size in files.items():
        path = folder / name
        found = path.stat().st_size if path.exists() else None
        if found != size:
            raise ValueError(
                f"the checkpoint is torn: {path} "
                + ("is missing" if found is None else f"has {found} bytes, {size} expected")
                + f"; {advice}"
            )
    return {**manifest, "step": step}


def step_folder(folder: Path, step: int) -> Path:
    """Where what is written after a step goes."""
    return folder / f"step-{step:08d}"


def steps_in(folder: Path) -> list[int]:
    """The steps whose folders are whole, in order."""
    names = (re.fullmatch(r"step-(\d+)", path.name) for path in folder.glob("step-*"))
    return sorted(int(name[1]) for name in names if name)


def remove(folder: Path) -> None:
    """At once under its name; removing the files takes time, and could be interrupted."""
    removed = folder.with_suffix(".removed")
    os.replace(folder, removed)
    shutil.rmtree(removed, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Of writing and removing that something killed."""
    for leftover in (*folder.glob("*.unfinished"), *folder.glob("*.removed")):
        shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def _full_disk_is_an_os_error(folder: Path) -> Iterator[None]:
    """torch.save raises RuntimeError."""
    try:
        yield
    except (RuntimeError, OSError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise
        if "PytorchStreamWriter" not in str(error) and "unexpected pos" not in str(error):
            raise
        raise OSError(f"cannot write the checkpoint {folder}: {error}") from error


def _sync_files(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
