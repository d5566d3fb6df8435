"""Ragged lists to tensors, and the order in which rows are visited."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from random import Random

import torch

_MOST_BATCHES_SORTED_TOGETHER = 32


def collate_right(
    sequences: Sequence[Sequence[int]], pad_id: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad sequences at the right: input_ids (B, T) int64 and their lengths (B,) int64.

    Masks come from the lengths (`length_mask`), never from the ids: text may hold `pad_id`.
    """
    lengths = torch.tensor([len(s) for s in sequences], dtype=torch.int64)  # (B,)
    width = max((len(s) for s in sequences), default=0)
    padded = [[*s, *[pad_id] * (width - len(s))] for s in sequences]
    input_ids = torch.tensor(padded, dtype=torch.int64)
    return input_ids.reshape(len(sequences), width), lengths  # (B, T), (B,)


def length_mask(lengths: torch.Tensor, width: int) -> torch.Tensor:
    """Return a bool mask (B, width), True at the first `lengths` positions of each row."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]  # (B, T)


class LengthGroupedBatches:
    """Batches of row indices with nearly equal lengths, in a new order each epoch.

    The rows are shuffled, sorted by length in stretches of a few batches, cut into batches, and
    the batches shuffled: little padding, little bias. The order depends on (seed, epoch) only, so
    a run that resumes in epoch e at batch i goes on where it stopped.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, *, seed: int = 0) -> None:
        if not lengths:
            raise ValueError("no rows to make batches of")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self._lengths = list(lengths)
        self._batch_size = batch_size
        self._seed = seed

    def __len__(self) -> int:
        """Return the number of batches in an epoch; the last rows make a smaller one."""
        return -(-len(self._lengths) // self._batch_size)

    def epoch(self, epoch: int) -> Iterator[list[int]]:
        """Yield the batches of an epoch, each row exactly once."""
        rng = Random(f"{self._seed}-{epoch}")
        order = list(range(len(self._lengths)))
        rng.shuffle(order)
        together = min(_MOST_BATCHES_SORTED_TOGETHER, max(1, len(self) // 4))
        stretch = self._batch_size * together  # of few rows a part: batches must mix anew
        for start in range(0, len(order), stretch):
            order[start : start + stretch] = sorted(
                order[start : start + stretch], key=lambda i: self._lengths[i]
            )
        batches = [
            order[start : start + self._batch_size]
            for start in range(0, len(order), self._batch_size)
        ]
        rng.shuffle(batches)
        yield from batches


def shuffled_batches(count: int, batch_size: int, *, seed: int = 0) -> Iterator[list[int]]:
    """Yield whole batches of row indices without end, each pass over the rows in a new order.

    What is left of a pass when no whole batch fits is left out of it; fewer rows than a batch
    make one batch of all of them.
    """
    size = min(batch_size, count)
    if size < 1:
        raise ValueError("no rows to make batches of")
    rng = Random(seed)
    while True:
        order = list(range(count))
        rng.shuffle(order)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]
