"""Triton kernels of the training ops. Nothing here imports triton until `register` is called."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hybrid_engine.ops.registry import NAMESPACE, OPS


@dataclass(frozen=True)
class TritonStatus:
    """What was registered, or why nothing."""

    ops: tuple[str, ...]  # names of the ops that a Triton kernel serves
    reason: str | None  # why there is none


def load() -> TritonStatus:
    """Serve CUDA tensors by Triton, by the policy in HYBRID_ENGINE_NATIVE (see `ops.native`)."""
    policy = os.environ.get("HYBRID_ENGINE_NATIVE", "auto")
    if policy == "off":
        return TritonStatus((), "HYBRID_ENGINE_NATIVE=off")
    if torch.version.cuda is None:
        return TritonStatus((), "this build of torch has no CUDA")
    try:
        return TritonStatus(register("CUDA"), None)
    except ImportError as error:
        if policy == "require":
            raise
        warnings.warn(
            f"training ops run on their PyTorch reference on the GPU, because: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return TritonStatus((), str(error))


def register(key: str) -> tuple[str, ...]:
    """Let Triton serve the ops that have no kernel yet for a dispatch key; returns their names.

    "CPU" is for the interpreter (TRITON_INTERPRET=1), which reads host memory.
    """
    from hybrid_engine.ops.triton.launchers import LAUNCHERS

    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    names = tuple(name for name in LAUNCHERS if not has_kernel(f"{NAMESPACE}::{name}", key))
    for name in names:
        _library.impl(name, _on_device_of_arguments(LAUNCHERS[name]), key)
        OPS[name].triton_keys.add(key)
    return names


_library = torch.library.Library(NAMESPACE, "FRAGMENT")


def _on_device_of_arguments(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be that of the tensors."""

    @functools.wraps(launcher)
    def launch(*args: Any) -> Any:
        tensor = next(arg for arg in args if isinstance(arg, torch.Tensor))
        with torch.cuda.device_of(tensor):
            return launcher(*args)

    return launch
