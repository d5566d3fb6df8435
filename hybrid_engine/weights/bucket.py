"""One all-gather for many parameters: every rank's runs, one after another, as one flat bucket."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hybrid_engine.weights.shards import Pending, ShardedParameters


@dataclass(frozen=True)
class Place:
    """Where a parameter is in each rank's part of the bucket."""

    dtype: torch.dtype
    start: int  # in elements of the dtype
    length: int  # likewise


class Bucket:
    """The runs of some parameters, gathered by one collective.

    DeepSpeed keeps the trained parameters in one flat buffer. In the order in which they lie there
    their runs are one slice of it, which is sent as it is; runs that lie apart are copied together.
    The order is the same on all ranks, so it does not depend on addresses. Parameters of several
    dtypes travel as bytes, the wide ones first.
    """

    def __init__(self, parameters: list[nn.Parameter], shards: ShardedParameters) -> None:
        storages: dict[int, int] = {}  # in the order of their first parameter

        def order(parameter: nn.Parameter) -> tuple[int, int, int]:
            run = shards.run(parameter)
            storage = storages.setdefault(run.untyped_storage().data_ptr(), len(storages))
            return -parameter.dtype.itemsize, storage, int(run.storage_offset())

        self._shards = shards
        self._parameters = sorted(parameters, key=order)
        dtypes = {parameter.dtype for parameter in parameters}
        self.dtype = dtypes.pop() if len(dtypes) == 1 else torch.uint8  # of the collective
        self.places: dict[nn.Parameter, Place] = {}
        size = 0  # bytes
        for parameter in self._parameters:
            width, length = parameter.dtype.itemsize, shards.run(parameter).numel()
            self.places[parameter] = Place(parameter.dtype, size // width, length)
            size += length * width
        widest = max(parameter.dtype.itemsize for parameter in parameters)
        padded = -(-size // widest) * widest  # so that every rank's part starts aligned
        self._padding = padded - size  # bytes
        self.length = padded // self.dtype.itemsize  # elements of one rank's part

    def gather(self, received: Tensor) -> Pending:
        """Start to fill `received`, (world, length) of the bucket's dtype."""
        return self._shards.all_gather(received, self.part(received.device))

    def part(self, device: torch.device) -> Tensor:
        """(length,) what this rank sends: its runs where they lie, or a copy."""
        runs = [self._shards.run(parameter) for parameter in self._parameters]
        if self._are_adjacent(runs, device):
            return runs[0].as_strided((self.length,), (1,))
        pieces = [run.to(device).view(self.dtype) for run in runs]
        if self._padding:
            pieces.append(torch.zeros(self._padding, dtype=self.dtype, device=device))
        return torch.cat(pieces)

    def views(self, received: Tensor) -> dict[torch.dtype, Tensor]:
        """The gathered bucket, (world, elements), as each of the parameters' dtypes."""
        dtypes = {place.dtype for place in self.places.values()}
        return {dtype: received.view(dtype) for dtype in dtypes}

    def _are_adjacent(self, runs: list[Tensor], device: torch.device) -> bool:
        if self.dtype == torch.uint8 or self._padding or runs[0].device != device:
            return False
        storage, end = runs[0].untyped_storage().data_ptr(), runs[0].data_ptr()
        for run in runs:
            if run.data_ptr() != end or run.untyped_storage().data_ptr() != storage:
                return False
            end += run.numel() * run.element_size()
        return True
