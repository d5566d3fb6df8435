"""Batches as dicts of columns, the way `datasets` hands them out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from datasets import Dataset

from rlhf import distributed

Columns = Mapping[str, list[Any]]

ROWS_IN_MEMORY = 4096


def pieces(rows: Dataset) -> Iterator[dict[str, list[Any]]]:
    """The rows in order, a part of them in memory at a time."""
    for start in range(0, len(rows), ROWS_IN_MEMORY):
        yield rows[start : start + ROWS_IN_MEMORY]


def row_lengths(rows: Dataset) -> list[int]:
    """Tokens of each row; of a pair, of both sides."""
    if "input_ids" in rows.column_names:
        return [len(ids) for ids in rows["input_ids"]]
    sides = (rows["chosen_ids"], rows["rejected_ids"])
    return [len(chosen) + len(rejected) for chosen, rejected in zip(*sides, strict=True)]


def micro_batches(batch: Columns, size: int) -> Iterator[tuple[dict[str, list[Any]], float]]:
    """This rank's pieces of at most `size` rows, and what their losses weigh.

    Every rank gets as many pieces, since ranks that share a model compute together. One that has no
    row left repeats the batch's first one with weight 0.
    """
    count = len(next(iter(batch.values())))
    for places, weight in distributed.even_parts(count, size):
        yield {name: [column[i] for i in places] for name, column in batch.items()}, weight
