"""Ops on a GPU, for tests that make their tensors on the CPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_engine import ops

HOST_ARGUMENTS = {("gather_unpack", 1)}  # (op, index): read on the host, so they stay there


@dataclass(frozen=True)
class OnDevice:
    """`run(op, *args)` on the GPU: arguments keep their layout and their alignment.

    Results come back to the CPU, and so does what the op wrote into its arguments.
    """

    def __call__(self, op: Any, *args: Any) -> Any:
        if op.implementation("cuda") != "native":
            pytest.fail(f"no native {op.name} on CUDA: {ops.NATIVE.cuda_reason}")
        moved = _Moved()
        there = [
            arg if (op.name, index) in HOST_ARGUMENTS else moved.to_device(arg)
            for index, arg in enumerate(args)
        ]
        out = op(*there)
        moved.copy_back()
        if isinstance(out, tuple):
            return tuple(tensor.cpu() for tensor in out)
        return None if out is None else out.cpu()


@dataclass(frozen=True)
class _Moved:
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # on the host, on the device

    def to_device(self, argument: Any) -> Any:
        if isinstance(argument, list):
            return [self.to_device(item) for item in argument]
        if not isinstance(argument, Tensor):
            return argument
        storage = argument.untyped_storage().cuda()
        device = torch.empty(0, dtype=argument.dtype, device="cuda")
        device.set_(storage, argument.storage_offset(), argument.shape, argument.stride())
        self.pairs.append((argument, device))
        return device

    def copy_back(self) -> None:
        for host, device in self.pairs:
            host.copy_(device)
