"""A copy of the weights for rollout: gathered from ZeRO-3, cut for tensor parallelism, or both."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hybrid_engine.models.cuts import heads_of
from hybrid_engine.models.family import Family
from hybrid_engine.models.lora import active_adapters, is_lora
from hybrid_engine.models.placing import Groups, Placing
from hybrid_engine.models.skeleton import skeleton
from hybrid_engine.parallel import TensorParallel
from hybrid_engine.weights import (
    LayerStream,
    ShardedParameters,
    ShardedUnit,
    Unit,
    WholeUnit,
    collect_only,
    fill,
)

Mode = Literal["pin", "stream"]
_ALIGNMENT = 256  # bytes


class RolloutCopy:
    """A module tree like the model's, whose parameters live from `refresh` to `drop`.

    Pinned, all of them are there. Streamed, one layer's memory serves all layers, and `stream`
    fills it before each is computed.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        *,
        shards: ShardedParameters | None,
        parallel: TensorParallel | None,
        dtype: torch.dtype | None = None,
        merge_lora: bool = True,
    ) -> None:
        """`dtype` None: as the weights are stored."""
        self._live: Any = model
        self._live_family = family
        self.shards = shards
        self.parallel = parallel
        self._dtype = dtype
        self._merge_lora = merge_lora
        self.family = dataclasses.replace(family, qkv_rows_by_head=False)
        self.model: nn.Module = nn.Module()
        self._build()

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def vocab_size(self) -> int:
        """Rows of the whole head."""
        return self._shape_of(self._live.get_output_embeddings().weight)[0]

    @property
    def embedded_tokens(self) -> int:
        """Rows of the whole embedding."""
        return self._shape_of(self._live.get_input_embeddings().weight)[0]

    def bytes(self, mode: Mode) -> int:
        """Of the copy on this rank, with what is needed to gather it."""
        layers = [_size(groups) for groups in self._layers]
        received = [unit.received_bytes for unit in self._units]
        if mode == "stream":
            return _size(self._rest) + max(layers) + max(received)
        return _size(self._rest) + sum(layers) + 2 * max(received)

    def refresh(self, mode: Mode, on_start: Callable[[], object]) -> LayerStream | None:
        """Copy the weights as they are now; streamed, those outside the layers.

        All ranks call it. `on_start` is called after each collective has been started.
        """
        _allocate(self._rest, self._device)
        if mode == "pin":
            for groups in self._layers:
                _allocate(groups, self._device)
            fill(self._units, self._device, on_start)
            return None
        slot = torch.empty(
            max(_size(groups) for groups in self._layers), dtype=torch.uint8, device=self._device
        )
        for groups in self._layers:
            _lay_out(groups, slot)
        fill(self._units[-1:], self._device, on_start)
        return LayerStream(self._units[:-1], self._device, on_start)

    def collectives(self, mode: Mode) -> list[Callable[[], object]]:
        """What `refresh` does with the other ranks, one after another, without its results."""
        if self.shards is None:
            return []
        units = self._units if mode == "pin" else self._units[-1:]
        return [lambda unit=unit: collect_only(unit, self._device) for unit in units]  # type: ignore[misc]

    def layer_collectives(self) -> list[Callable[[], object]]:
        """What `stream` does with the other ranks in one pass, likewise."""
        return [lambda unit=unit: collect_only(unit, self._device) for unit in self._units[:-1]]  # type: ignore[misc]

    def drop(self) -> None:
        """Free the copy."""
        for groups in (*self._layers, self._rest):
            for group in groups:
                for placement in group:
                    placement.destination.data = placement.destination.data.new_empty(0)

    def rebuild_if_changed(self) -> None:
        """Follow the model: other modules or parameters, adapters switched, set or scaled."""
        if self._key() != self._built_for:
            self._build()

    def _build(self) -> None:
        self._built_for = self._key()
        placing = Placing(
            self._live, self._live_family, self._shape_of, self.parallel,
            dtype=self._dtype, merge_lora=self._merge_lora,
        )  # fmt: skip
        self._layers, self._rest = placing.layers, placing.rest
        self._units = [self._unit(groups) for groups in (*self._layers, self._rest)]
        self._device = self._rest[0][0].source.device
        twin = skeleton(self._live, placing.parameters, placing.instead, placing.attributes)
        twin.__dict__["config"] = self._config()
        self.model.__dict__ = twin.__dict__
        self.model.__class__ = twin.__class__

    def _unit(self, groups: Groups) -> Unit:
        placements = [placement for group in groups for placement in group]
        if self.shards is None:
            return WholeUnit(placements)
        return ShardedUnit(placements, self.shards)

    def _config(self) -> Any:
        """The model's, with the heads that this rank has."""
        config = copy.copy(self._live.config)
        heads = heads_of(config, self.parallel)
        config.num_attention_heads = heads.query[1] - heads.query[0]
        if getattr(config, "num_key_value_heads", None):
            config.num_key_value_heads = heads.kv[1] - heads.kv[0]
        config.head_dim = heads.head_dim
        return config

    def _shape_of(self, parameter: nn.Parameter) -> tuple[int, ...]:
        return tuple(self.shards.shape(parameter) if self.shards else parameter.shape)

    def _key(self) -> list[Any]:
        key: list[Any] = []
        for module in self._live.modules():
            key.append(module)
            key.extend(id(parameter) for parameter in module._parameters.values())
            if is_lora(module):
                active = active_adapters(module)
                key.append([(name, module.scaling[name]) for name in active])
        return key


def _size(groups: Groups) -> int:
    return sum(_padded(_bytes(group)) for group in groups)


def _bytes(group: Sequence[Any]) -> int:
    return sum(_numel(p.to_shape) * p.destination.dtype.itemsize for p in group)


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _allocate(groups: Groups, device: torch.device) -> None:
    _lay_out(groups, torch.empty(_size(groups), dtype=torch.uint8, device=device))


def _lay_out(groups: Groups, memory: Tensor) -> None:
    """Make the destinations views of the memory, (bytes,) uint8."""
    start = 0
    for group in groups:
        place = start
        for placement in group:
            dtype = placement.destination.dtype
            end = place + _numel(placement.to_shape) * dtype.itemsize
            placement.destination.data = memory[place:end].view(dtype).view(placement.to_shape)
            place = end
        start += _padded(_bytes(group))
