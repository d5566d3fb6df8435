"""Ranks that generate together: who shares a copy of the weights, and how none waits in vain."""

from __future__ import annotations

import contextlib
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class PeerError(RuntimeError):
    """Another rank failed; the message is its rank and what it raised."""


@dataclass(frozen=True)
class TensorParallel:
    """The ranks that share one copy of the weights, and this one's place among them."""

    rank: int
    size: int
    group: Any  # of torch.distributed

    def share(self, count: int) -> tuple[int, int]:
        """[begin, end) of this rank, of `count` things in equal parts; the last may have less."""
        part = -(-count // self.size)
        return min(self.rank * part, count), min((self.rank + 1) * part, count)

    def sum(self, x: Tensor) -> Tensor:
        """Add up in place over the ranks."""
        dist.all_reduce(x, group=self.group)
        return x

    def concatenate(self, x: Tensor) -> Tensor:
        """(N, V) of each rank -> (N, size * V), in the order of ranks."""
        parts = x.new_empty(self.size, *x.shape)
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        gather(parts.view(-1), x.contiguous().view(-1), group=self.group)
        return parts.transpose(0, 1).reshape(x.shape[0], -1)

    def least(self, value: int, device: torch.device) -> int:
        """The smallest of the ranks' values."""
        found = torch.tensor(value, dtype=torch.int64, device=device)
        dist.all_reduce(found, op=dist.ReduceOp.MIN, group=self.group)
        return int(found)

    def gather_objects(self, value: Any) -> list[Any]:
        """What each rank has, in the order of ranks."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values


def world_rank() -> int:
    """Of this process among all; 0 where it is alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def tensor_parallel(size: int, group: Any = None) -> TensorParallel | None:
    """This rank's group of `size` consecutive ranks, or the one given; None if it is alone.

    Every rank of the world calls it, unless it brings its group. Raises ValueError when the ranks
    cannot be divided so.
    """
    if size == 1 and group is None:
        return None
    if not dist.is_initialized():
        raise ValueError(
            f"inference_tp_size={size} needs that many ranks; start them with torchrun or deepspeed"
        )
    world = dist.get_world_size()
    if group is None:
        if world % size:
            raise ValueError(
                f"inference_tp_size={size} does not divide the {world} ranks there are; choose a "
                f"divisor of {world}"
            )
        groups = [
            dist.group.WORLD if size == world else dist.new_group(range(first, first + size))
            for first in range(0, world, size)
        ]
        group = groups[dist.get_rank() // size]
    elif dist.get_world_size(group) != size:
        raise ValueError(
            f"inference_tp_size={size}, but the group given has {dist.get_world_size(group)} ranks"
        )
    return TensorParallel(dist.get_rank(group), size, group)


class Lockstep:
    """Ranks whose collectives must meet, although they have different amounts of work.

    The work is cut into stretches of collectives. Before each one the ranks tell each other in one
    small reduction whether they have work, and whether somebody failed. A rank without work takes
    part in the stretches of the others. A rank that fails in the middle of one takes part in what
    is left of it, which it finds in `owed`; the next exchange tells the others what happened.
    """

    def __init__(self, group: Any, device: torch.device, owed: deque[Callable[[], object]]) -> None:
        self._group = group
        self._device = device
        self._owed = owed  # what would take part in each collective still to come, in order
        self._over = False  # a failure has been told to all

    def begin(self, vote: bool = False) -> bool:
        """A stretch begins. Whether any rank votes; PeerError if another rank has failed."""
        return self._exchange(running=True, vote=vote)[1]

    @contextlib.contextmanager
    def together(self, idle: Callable[[], object] | None = None) -> Iterator[None]:
        """The body's stretches, then `idle`, one stretch each, until every rank has left its body.

        An exception of one rank's body ends all: there as it is, elsewhere as PeerError.
        """
        self._over = False
        try:
            yield
        except BaseException as error:
            if not self._over:
                self._announce(error)
            raise
        while self._exchange(running=False)[0]:
            if idle is None:
                raise RuntimeError("the ranks of a tensor-parallel group fell out of step")
            idle()

    def _announce(self, error: BaseException) -> None:
        """Release the others from the stretch, and tell them why it was the last."""
        lines = traceback.format_exception_only(error)
        with contextlib.suppress(RuntimeError):  # this rank's own error is the one to raise
            while self._owed:
                self._owed.popleft()()
            self._exchange(running=False, error="".join(lines).strip())

    def _exchange(
        self, *, running: bool, vote: bool = False, error: str | None = None
    ) -> tuple[bool, bool]:
        """Whether any rank has work, and whether any votes. Raises PeerError if any has failed."""
        said = (running, vote, error is not None)
        flags = torch.tensor(said, dtype=torch.int32, device=self._device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX, group=self._group)
        anyone_running, anyone_votes, anyone_failed = flags.tolist()
        if anyone_failed:
            self._over = True
            raise PeerError(self._reasons(error))
        return bool(anyone_running), bool(anyone_votes)

    def _reasons(self, error: str | None) -> str:
        told: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(told, (dist.get_rank(), error), group=self._group)
        return "; ".join(f"rank {rank} failed: {reason}" for rank, reason in told if reason)
