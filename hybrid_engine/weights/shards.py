"""Parameters that are spread over ranks, as ZeRO-3 spreads them, seen without importing DeepSpeed.

ZeRO-3 (arXiv 1910.02054) cuts the n elements of a parameter, in row-major order, into one run of
ceil(n / world) for each rank; the last ones are padded. The layout is DeepSpeed 0.19's: a parameter
carries its rank's run as `ds_tensor`, its whole size as `ds_shape`, its ranks as
`ds_process_group`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Pending(Protocol):
    """A collective on its way."""

    def wait(self) -> Any: ...


class ShardedParameters(Protocol):
    """What the engine asks of parameters that no rank holds whole."""

    @property
    def world(self) -> int:
        """How many ranks hold a run of every parameter."""

    @property
    def group(self) -> Any:
        """Those ranks, as torch.distributed has them; None: all."""

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        """Of the whole parameter."""

    def run(self, parameter: nn.Parameter) -> Tensor:
        """(ceil(n / world),) elements of it that this rank holds, the same memory."""

    def all_gather(self, out: Tensor, part: Tensor) -> Pending:
        """Start to fill `out` (world, L) with every rank's `part` (L,). All ranks call it."""


class Zero3Parameters:
    """The parameters of a model that DeepSpeed has partitioned."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        """Raises ValueError for partitions that are not this rank's plain run of the weights."""
        for parameter in parameters:
            _check(parameter)
            group = parameter.ds_process_group  # type: ignore[attr-defined]
            if not hasattr(self, "_group"):
                self._group = group
            if group is not self._group:
                raise ValueError(
                    "the hybrid engine gathers ZeRO-3 parameters of one group of ranks; this model "
                    "has several (as mixture-of-experts layers do)"
                )

    @property
    def world(self) -> int:
        return dist.get_world_size(self._group)

    @property
    def group(self) -> Any:
        return self._group

    def shape(self, parameter: nn.Parameter) -> torch.Size:
        return whole_shape(parameter)

    def run(self, parameter: nn.Parameter) -> Tensor:
        return parameter.ds_tensor.data  # type: ignore[attr-defined]

    def all_gather(self, out: Tensor, part: Tensor) -> Pending:
        # newer torch deprecates the longer name
        gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        return gather(out.view(-1), part, group=self._group, async_op=True)


def sharded_parameters(model: nn.Module) -> ShardedParameters | None:
    """The model's parameters if ZeRO-3 has partitioned them, None if every rank has them whole.

    Raises ValueError for a mixture, and for options of ZeRO-3 that are not served.
    """
    named = dict(model.named_parameters())
    whole = [name for name, parameter in named.items() if not hasattr(parameter, "ds_tensor")]
    if len(whole) == len(named):
        return None
    if whole:
        raise ValueError(
            f"ZeRO-3 has partitioned this model but not {whole[0]}; add parameters before "
            "deepspeed.initialize"
        )
    return Zero3Parameters(named.values())


def whole_shape(parameter: nn.Parameter) -> torch.Size:
    """Of a parameter, partitioned or not."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _check(parameter: Any) -> None:
    part = parameter.ds_tensor
    if part is None:
        raise ValueError("a parameter is not partitioned yet; call deepspeed.initialize first")
    if not part.is_floating_point() or hasattr(part, "ds_quant_scale"):
        raise ValueError(
            "the hybrid engine does not read quantized ZeRO-3 partitions; set "
            "zero_quantized_weights and zero_quantized_nontrainable_weights to false"
        )
    if part.numel() * dist.get_world_size(parameter.ds_process_group) < parameter.ds_numel:
        raise ValueError(
            f"a ZeRO-3 partition has {part.numel()} elements of {parameter.ds_numel}: it is not in "
            "memory (offload_param to nvme?); offload to cpu or not at all"
        )
