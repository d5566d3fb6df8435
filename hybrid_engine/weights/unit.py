"""What is gathered together: the parameters of one layer, or those that are in none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from hybrid_engine.weights.bucket import Bucket
from hybrid_engine.weights.pieces import Placement, Unpacking, whole
from hybrid_engine.weights.shards import Pending, ShardedParameters


class Unit(Protocol):
    """Placements whose sources become readable together."""

    @property
    def received_bytes(self) -> int:
        """Of the buffer that `start` fills."""

    def start(self, buffer: Tensor) -> Pending | None:
        """Begin to collect the sources in a (received_bytes,) uint8 buffer."""

    def finish(self, buffer: Tensor) -> None:
        """Write the destinations, after what `start` gave has been waited for."""


class WholeUnit:
    """Sources that this rank has whole: nothing is collected."""

    received_bytes = 0

    def __init__(self, placements: Sequence[Placement]) -> None:
        by_source: dict[nn.Parameter, list[Placement]] = defaultdict(list)
        for placement in placements:
            by_source[placement.source].append(placement)
        self._unpackings = {
            source: Unpacking(group, {source: (0, source.numel())})
            for source, group in by_source.items()
        }
        self._factors = _factors(placements)

    def start(self, buffer: Tensor) -> None:
        return None

    def finish(self, buffer: Tensor) -> None:
        factors = {factor: factor.data for factor in self._factors}
        for source, unpacking in self._unpackings.items():
            unpacking.run(source.data.reshape(1, -1), factors)


class ShardedUnit:
    """Sources that one all-gather collects: one collective, one unpack (one for each dtype)."""

    def __init__(self, placements: Sequence[Placement], shards: ShardedParameters) -> None:
        factors = _factors(placements)
        sources = dict.fromkeys([p.source for p in placements] + factors)
        self._bucket = Bucket(list(sources), shards)
        self._world = shards.world
        self._scratch = {factor: _scratch(factor, shards) for factor in factors}
        self._low_rank = self._unpackings(list(self._scratch.values()))
        self._all = self._unpackings(placements)

    @property
    def received_bytes(self) -> int:
        return self._world * self._bucket.length * self._bucket.dtype.itemsize

    def start(self, buffer: Tensor) -> Pending:
        return self._bucket.gather(self._received(buffer))

    def finish(self, buffer: Tensor) -> None:
        views = self._bucket.views(self._received(buffer))
        for placement in self._scratch.values():
            placement.destination.data = torch.empty(
                placement.shape, dtype=placement.source.dtype, device=buffer.device
            )
        factors = {factor: p.destination.data for factor, p in self._scratch.items()}
        for unpackings in (self._low_rank, self._all):
            for dtype, unpacking in unpackings.items():
                unpacking.run(views[dtype], factors)
        for placement in self._scratch.values():
            placement.destination.data = placement.destination.data.new_empty(0)

    def _received(self, buffer: Tensor) -> Tensor:
        used = buffer[: self.received_bytes]
        return used.view(self._bucket.dtype).view(self._world, self._bucket.length)

    def _unpackings(self, placements: Sequence[Placement]) -> dict[torch.dtype, Unpacking]:
        by_dtype: dict[torch.dtype, list[Placement]] = defaultdict(list)
        for placement in placements:
            by_dtype[placement.source.dtype].append(placement)
        places = self._bucket.places.items()
        starts = {parameter: (place.start, place.length) for parameter, place in places}
        return {dtype: Unpacking(group, starts) for dtype, group in by_dtype.items()}


def _factors(placements: Sequence[Placement]) -> list[nn.Parameter]:
    loras = [p.lora for p in placements if p.lora is not None]
    return [factor for lora in loras for factor in (lora.a, lora.b)]


def _scratch(factor: nn.Parameter, shards: ShardedParameters) -> Placement:
    shape = shards.shape(factor)
    holder = nn.Parameter(factor.data.new_empty(0), requires_grad=False)
    return Placement(factor, shape, holder, shape, whole(shape))
