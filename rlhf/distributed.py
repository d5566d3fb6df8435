"""This process among its ranks: who it is, its share of the work, and sums over all of them.

Alone, every function is the identity. The processes are joined by `rlhf.engines`' launcher or by
whoever starts them; nothing here starts anything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def is_first() -> bool:
    """Whether this rank writes files and speaks to the terminal."""
    return rank() == 0


def barrier() -> None:
    if world_size() > 1:
        dist.barrier()


def share(items: Sequence[T]) -> Sequence[T]:
    """This rank's consecutive part; all parts in the order of ranks are the items."""
    start, end = (place * len(items) // world_size() for place in (rank(), rank() + 1))
    return items[start:end]


def broadcast(value: T) -> T:
    """What the first rank has, on every rank. The value is pickled."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, device=_device())
    return box[0]


def decided_by_first(function: Callable[[], T]) -> T:
    """What the function returns on the first rank, which alone calls it; or raises, on all."""
    if world_size() == 1:
        return function()
    outcome: tuple[T | None, Exception | None] = (None, None)
    if is_first():
        try:
            outcome = (function(), None)
        except Exception as error:
            outcome = (None, error)
    value, raised = broadcast(outcome)
    if raised is not None:
        raise raised
    return value  # type: ignore[return-value]


def all_of(items: Sequence[T]) -> list[T]:
    """The ranks' items after one another, on every rank. They are pickled."""
    if world_size() == 1:
        return list(items)
    parts: list[Sequence[T]] = [[]] * world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def total(*values: float) -> list[float]:
    """Each value summed over the ranks, in fp64."""
    if world_size() == 1:
        return list(values)
    sums = torch.tensor(values, dtype=torch.float64, device=_device())
    dist.all_reduce(sums)
    return sums.tolist()


def mean(part: float, count: int) -> float:
    """Of numbers of which this rank has `count` that add up to `part`; 0 of none."""
    whole, of_all = total(part, count)
    return whole / max(1.0, of_all)


def largest(value: float) -> float:
    """The greatest of the ranks' values."""
    if world_size() == 1:
        return value
    found = torch.tensor(value, dtype=torch.float64, device=_device())
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def even_parts(count: int, size: int) -> Iterator[tuple[range, float]]:
    """This rank's places among `count`, in parts of at most `size`, and what each part weighs.

    Every rank gets as many parts, since ranks that share a model compute together. One that has no
    place left repeats the first one with weight 0.
    """
    ours = range(rank(), count, world_size())
    for start in range(0, -(-count // world_size()), size):
        yield ours[start : start + size] or range(1), 1.0 if start < len(ours) else 0.0


def gather_rows(
    columns: Mapping[str, Tensor], *, padding: Mapping[str, int] | None = None
) -> dict[str, Tensor]:
    """The ranks' rows below one another, in the order of ranks.

    Args:
        columns: (b,) or (b, t) tensors; b and t may differ from rank to rank, dtypes may not.
        padding: what fills a column of smaller t at the right, by name; 0 where it is not named.

    Returns (B,) or (B, T) tensors, the same on every rank.
    """
    if world_size() == 1:
        return dict(columns)
    device = next(iter(columns.values())).device
    shapes = gather(torch.tensor([list(_rows_and_width(c)) for c in columns.values()]).to(device))
    gathered = {}
    for i, (name, column) in enumerate(columns.items()):
        rows, width = (int(n) for n in shapes[:, i].amax(0))
        missing = (0, width - column.shape[1]) if column.dim() == 2 else ()
        column = nn.functional.pad(column, (*missing, 0, rows - column.shape[0]))
        if column.dim() == 2 and padding and name in padding:
            column[:, shapes[rank(), i, 1] :] = padding[name]
        parts = gather(column)
        gathered[name] = torch.cat(
            [part[: int(n)] for part, n in zip(parts, shapes[:, i, 0], strict=True)]
        )
    return gathered


@contextlib.contextmanager
def first_rank_first() -> Iterator[None]:
    """The first rank runs the block alone, to fill a cache; then the others find it full."""
    if not is_first():
        barrier()
    yield
    if is_first():
        barrier()


def gather(tensor: Tensor) -> Tensor:
    """(...) of one shape on all ranks -> (ranks, ...)."""
    if world_size() == 1:
        return tensor.unsqueeze(0)
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor)
    return torch.stack(parts)


def _rows_and_width(column: Tensor) -> tuple[int, int]:
    return column.shape[0], column.shape[1] if column.dim() == 2 else 1


def _device() -> torch.device:
    """Where collectives of the backend want their tensors."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
