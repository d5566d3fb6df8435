"""Batches as dicts of columns, the way `datasets` hands them out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Columns = Mapping[str, list[Any]]


def micro_batches(batch: Columns, size: int) -> Iterator[dict[str, list[Any]]]:
    """Consecutive pieces of at most `size` rows."""
    count = len(next(iter(batch.values())))
    for start in range(0, count, size):
        yield {name: list(column[start : start + size]) for name, column in batch.items()}
