"""Filling the decoder's layouts: everything at once, or layer by layer while the pass goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hybrid_engine.weights.shards import Pending
from hybrid_engine.weights.unit import Unit

OnStart = Callable[[], object]  # called after each collective has been started


def fill(units: Sequence[Unit], device: torch.device, on_start: OnStart) -> None:
    """Fill every unit's destinations. One buffer receives while the other is unpacked."""
    buffers = [_buffer(units[::2], device), _buffer(units[1::2], device)]
    pending = _start(units[0], buffers[0], on_start)
    for i, unit in enumerate(units):
        if pending is not None:
            pending.wait()
        if i + 1 < len(units):
            pending = _start(units[i + 1], buffers[(i + 1) % 2], on_start)
        unit.finish(buffers[i % 2])


def collect_only(unit: Unit, device: torch.device) -> None:
    """Take part in a unit's collective for the sake of the other ranks."""
    pending = unit.start(_buffer([unit], device))
    if pending is not None:
        pending.wait()


class LayerStream:
    """Layers whose units share their destinations: each is there from `enter` to the next one's.

    While a layer is computed, the next one's bucket is on its way.
    """

    def __init__(self, units: Sequence[Unit], device: torch.device, on_start: OnStart) -> None:
        self._units = units
        self._buffer = _buffer(units, device)
        self._on_start = on_start
        self._pending: Pending | None = None

    def enter(self, layer: int) -> None:
        """Fill the destinations with a layer; call it for each in turn, from 0 on."""
        if layer == 0:
            self._pending = _start(self._units[0], self._buffer, self._on_start)
        assert self._pending is not None, "layers come in order"
        self._pending.wait()
        self._units[layer].finish(self._buffer)
        if layer + 1 < len(self._units):
            self._pending = _start(self._units[layer + 1], self._buffer, self._on_start)


def _start(unit: Unit, buffer: Tensor, on_start: OnStart) -> Pending | None:
    pending = unit.start(buffer)
    if pending is not None:
        on_start()
    return pending


def _buffer(units: Sequence[Unit], device: torch.device) -> Tensor:
    size = max((unit.received_bytes for unit in units), default=0)
    return torch.empty(size, dtype=torch.uint8, device=device)
