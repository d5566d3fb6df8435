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

    checked: bool = True  # contents too, with HYBRID_ENGINE_CHECK=1; False: the kernel alone
    name: str = "cuda"  # the device

    def __call__(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        if op.implementation(self.name) == "reference":
            pytest.fail(f"no {op.name} on {self.name}: {ops.NATIVE.cuda_reason}")
        moved = _Moved(self.name)
        there = [
            arg if (op.name, index) in HOST_ARGUMENTS else moved.to_device(arg)
            for index, arg in enumerate(args)
        ]
        named = {name: moved.to_device(arg) for name, arg in kwargs.items()}
        out = (op if self.checked else op.overload)(*there, **named)
        moved.copy_back()
        if isinstance(out, tuple):
            return tuple(tensor.cpu() for tensor in out)
        return None if out is None else out.cpu()


@dataclass(frozen=True)
class _Moved:
    device: str
    pairs: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # on the host, on the device

    def to_device(self, argument: Any) -> Any:
        if isinstance(argument, list):
            return [self.to_device(item) for item in argument]
        if not isinstance(argument, Tensor):
            return argument
        host = argument.untyped_storage()
        storage = torch.UntypedStorage(host.nbytes(), device=self.device)
        storage.copy_(host)
        there = torch.empty(0, dtype=argument.dtype, device=self.device)
        there.set_(storage, argument.storage_offset(), argument.shape, argument.stride())
        self.pairs.append((argument, there))
        return there

    def copy_back(self) -> None:
        for host, there in self.pairs:
            host.copy_(there)
