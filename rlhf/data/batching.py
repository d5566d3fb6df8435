"""Ragged lists to tensors, and the order in which rows are visited."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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


class RowBatches:
    """Batches of row indices without end, every pass over the rows in a new order.

    With `lengths` a batch's rows are nearly equally long: the rows are shuffled, sorted by length
    in stretches of a few batches, cut into batches, and the batches shuffled; little padding,
    little bias. Without, a batch is a plain random draw. With `whole`, what is left of a pass when
    no whole batch fits is left out of it.

    The order depends on (seed, epoch) only. `state_dict` is a position in it, which
    `load_state_dict` goes back to: the batches that follow are the very same.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        *,
        lengths: Sequence[int] | None = None,
        whole: bool = False,
        seed: int = 0,
    ) -> None:
        if rows < 1:
            raise ValueError("no rows to make batches of")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if lengths is not None and len(lengths) != rows:
            raise ValueError(f"lengths: expected one for each of {rows} rows, got {len(lengths)}")
        self._rows = rows
        self._batch_size = min(batch_size, rows)
        self._lengths = lengths
        self._whole = whole
        self._seed = seed
        self._epoch, self._batch = 0, 0  # of the batch that comes next
        self._order: tuple[int, list[list[int]]] = (-1, [])  # the epoch that it is, its batches

    def __len__(self) -> int:
        """Return the number of batches in an epoch; without `whole` the last may be smaller."""
        full, rest = divmod(self._rows, self._batch_size)
        return full if self._whole or not rest else full + 1

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        if self._order[0] != self._epoch:
            self._order = (self._epoch, self._batches_of(self._epoch))
        batch = self._order[1][self._batch]
        self._batch += 1
        if self._batch == len(self):
            self._epoch, self._batch = self._epoch + 1, 0
        return batch

    @property
    def epoch(self) -> int:
        """The epoch of the batch that comes next, from 0."""
        return self._epoch

    def state_dict(self) -> dict[str, int]:
        """Where in the data the next batch begins, and in what order of how many rows."""
        return {"epoch": self._epoch, "batch": self._batch, **self._identity()}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on where `state_dict` was taken. Raises ValueError if data or batches are others."""
        saved = {name: state[name] for name in self._identity()}
        if saved != self._identity():
            raise ValueError(
                f"cannot go on in other data: the position was saved with {saved}, and now it is"
                f" {self._identity()}; restore the dataset, batch_size and seed, or start anew"
            )
        self._epoch, self._batch = state["epoch"], state["batch"]

    def _identity(self) -> dict[str, int]:
        return {"rows": self._rows, "batch_size": self._batch_size, "seed": self._seed}

    def _batches_of(self, epoch: int) -> list[list[int]]:
        rng = Random(f"{self._seed}-{epoch}")
        order = list(range(self._rows))
        rng.shuffle(order)
        size = self._batch_size
        if self._lengths is not None:
            self._sort_stretches(order, self._lengths)
        batches = [order[start : start + size] for start in range(0, self._rows, size)]
        if self._lengths is not None:
            rng.shuffle(batches)
        return [b for b in batches if len(b) == size] if self._whole else batches

    def _sort_stretches(self, order: list[int], lengths: Sequence[int]) -> None:
        together = min(_MOST_BATCHES_SORTED_TOGETHER, max(1, len(self) // 4))
        stretch = self._batch_size * together  # of few rows a part: batches must mix anew
        for start in range(0, len(order), stretch):
            part = slice(start, start + stretch)
            order[part] = sorted(order[part], key=lambda i: lengths[i])
