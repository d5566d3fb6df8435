"""pytest plugin: CPU tensors are served by our Triton kernels in Triton's interpreter.

`TRITON_INTERPRET=1 HYBRID_ENGINE_NATIVE=off PYTHONPATH=tests/triton pytest -p interpreter ...`
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import triton.language as tl
from guarded_memory import guarded
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from hybrid_engine.ops import triton
from hybrid_engine.ops.triton import launchers


def pytest_configure(config: pytest.Config) -> None:
    compute_bf16_as_floats()
    for name, launcher in launchers.LAUNCHERS.items():
        launchers.LAUNCHERS[name] = guarded(launcher)
    assert set(triton.register("CPU")) == set(launchers.LAUNCHERS)


def compute_bf16_as_floats() -> None:
    """Compute bf16 in fp32 and round to nearest, as the hardware does.

    The interpreter keeps bf16 as its bits in uint16, multiplies and adds those as integers, and
    cuts the lower half off when it casts from fp32.
    """
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        return dot(self, _widened(a), _widened(b), d, *options)

    def cast_impl(self: Any, x: Any, to: Any) -> Any:
        if x.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return TensorHandle(_nearest_bf16(x.data), tl.bfloat16)
        return cast(self, x, to)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    for name in ("create_fadd", "create_fsub", "create_fmul", "create_fdiv"):
        setattr(InterpreterBuilder, name, _rounding(getattr(InterpreterBuilder, name)))


def _nearest_bf16(x: Any) -> Any:
    bits = np.asarray(x, np.float32).view(np.uint32)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to even, if halfway
    return np.where(np.isnan(x), 0x7FC0, nearest).astype(np.uint16)


def _rounding(operation: Callable[..., Any]) -> Callable[..., Any]:
    def compute(self: Any, a: Any, b: Any) -> Any:
        if a.dtype.scalar != tl.bfloat16:
            return operation(self, a, b)
        return self.create_fp_trunc(operation(self, _widened(a), _widened(b)), tl.bfloat16)

    return compute


def _widened(x: TensorHandle) -> TensorHandle:
    if x.dtype.scalar != tl.bfloat16:
        return x
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
