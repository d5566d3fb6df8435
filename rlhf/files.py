"""Folders and files that are either whole or not there."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def make_folder(path: Path) -> None:
    """With those above it, if it is not there. Raises OSError that says what to do."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"cannot write into the folder {path} ({error.strerror}): give another output_dir"
        ) from error


@contextlib.contextmanager
def finished_directory(path: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `path` only when the block ends well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_up_after_the_dead(path)
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


def _clear_up_after_the_dead(path: Path) -> None:
    """What killed processes of this machine left beside `path`: half a folder, or the old one."""
    for leftover in path.parent.glob(f".{path.name}.*.*"):
        _, pid, kind = leftover.name.rsplit(".", 2)
        if kind not in ("unfinished", "replaced") or not pid.isdigit() or _is_alive(int(pid)):
            continue
        if kind == "replaced" and not path.exists():
            os.replace(leftover, path)  # killed between moving it away and putting the new one
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextlib.contextmanager
def finished_file(path: Path) -> Iterator[Path]:
    """A file to write, which takes the place of `path` only when the block ends well."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
