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
from hybrid_engine.models.lora import active_adapters
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
# Layers up to so many bytes together are gathered together: below it, the latency of a collective
# is what counts.
_SMALL = 2 << 20


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
        layers_together: int = 1,
        merge_lora: bool = True,
    ) -> None:
        """`dtype` None: as the weights are stored. `layers_together`: pinned, so many small layers
        are gathered by one collective at most."""
        self._live: Any = model
        self._live_family = family
        self.shards = shards
        self.parallel = parallel
        self._dtype = dtype
        self._layers_together = layers_together
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
        layers, rest = [_size(groups) for groups in self._layers], _size(self._rest)
        received = max(unit.received_bytes for unit in self._units)
        if mode == "stream":
            return rest + max(layers) + received
        return rest + sum(layers) + 2 * received

    def refresh(self, mode: Mode, on_start: Callable[[], object]) -> LayerStream | None:
        """Copy the weights as they are now; streamed, those outside the layers.

        All ranks call it. `on_start` is called after each collective has been started.
        """
        _allocate(self._rest, self._device)
        if mode == "pin":
            for groups in self._layers:
                _allocate(groups, self._device)
            fill(self._pinned, self._device, on_start)
            return None
        slot = _memory(max(_size(groups) for groups in self._layers), self._device)
        for groups in self._layers:
            _lay_out(groups, slot)
        fill(self._units[-1:], self._device, on_start)
        return LayerStream(self._units[:-1], self._device, on_start)

    def collectives(self, mode: Mode) -> list[Callable[[], object]]:
        """What `refresh` does with the other ranks, one after another, without its results."""
        if self.shards is None:
            return []
        units = self._pinned if mode == "pin" else self._units[-1:]
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
        self._pinned = [self._unit(groups) for groups in self._together()]
        self._device = self._rest[0][0].source.device
        twin = skeleton(self._live, placing.parameters, placing.instead, placing.attributes)
        twin.__dict__["config"] = self._config()
        self.model.__dict__ = twin.__dict__
        self.model.__class__ = twin.__class__

    def _together(self) -> list[Groups]:
        """What one collective gathers when all is pinned: a layer, or several small ones."""
        together: list[Groups] = [[]]
        count = 0
        for groups in (*self._layers, self._rest):
            if count == self._layers_together or _size(together[-1]) + _size(groups) > _SMALL:
                together.append([])
                count = 0
            together[-1] += groups
            count += 1
        return [groups for groups in together if groups]

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
        """Equal as long as the copy is built for what the model is. Made at every flip: cheap."""
        key: list[Any] = []
        modules = [self._live]
        while modules:
            module = modules.pop()
            children = module._modules
            key.append(module)
            key.extend(map(id, module._parameters.values()))
            if "lora_A" in children:
                active = active_adapters(module)
                key.extend((name, module.scaling[name]) for name in active)
            modules.extend(child for child in children.values() if child is not None)
        return key


def _size(groups: Groups) -> int:
    return sum(_padded(_bytes(group)) for group in groups)


def _bytes(group: Sequence[Any]) -> int:
    return sum(_numel(p.to_shape) * p.destination.dtype.itemsize for p in group)


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _memory(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def _allocate(groups: Groups, device: torch.device) -> None:
    _lay_out(groups, _memory(_size(groups), device))


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
