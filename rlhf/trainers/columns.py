"""Batches as dicts of columns, the way `datasets` hands them out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf import distributed

Columns = Mapping[str, list[Any]]


def micro_batches(batch: Columns, size: int) -> Iterator[tuple[dict[str, list[Any]], float]]:
    """This rank's pieces of at most `size` rows, and what their losses weigh.

    Every rank gets as many pieces, since ranks that share a model compute together. One that has no
    row left repeats the batch's first one with weight 0.
    """
    count = len(next(iter(batch.values())))
    for places, weight in distributed.even_parts(count, size):
        yield {name: [column[i] for i in places] for name, column in batch.items()}, weight
