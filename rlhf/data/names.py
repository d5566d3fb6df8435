"""What a user's name for a dataset or tokenizer means, and how its failure is told."""

from __future__ import annotations

from pathlib import Path


def looks_local(name: str, *, suffixes: tuple[str, ...] = ()) -> bool:
    """Whether a name is meant as a path: never a hub's `name` or `organisation/name`."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(suffixes)


def missing_path(name: str, hint: str) -> FileNotFoundError:
    """Return the error for a path that is not there."""
    where = Path(name).expanduser().absolute()
    return FileNotFoundError(f"no such file or folder: {name!r} (looked at {where}). {hint}")


def first_line(error: BaseException) -> str:
    """Return an error's first line without its full stop, to quote it in another."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0].rstrip(".")
