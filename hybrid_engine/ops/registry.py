"""`define_op`: a schema, a naive PyTorch reference and a fake make an op.

The reference is the op's default on every device; a native library that is loaded later overrides
it where it has a kernel. So everything runs without a compiler, and every kernel has its truth
beside it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch

NAMESPACE = "hybrid_engine"
_DEFAULT_KEY = "CompositeExplicitAutograd"

P = ParamSpec("P")
R = TypeVar("R")

_CHECK = os.environ.get("HYBRID_ENGINE_CHECK", "0")
if _CHECK not in ("0", "1"):
    raise ValueError(f"HYBRID_ENGINE_CHECK={_CHECK!r}: expected 0 or 1")

_library = torch.library.Library(NAMESPACE, "DEF")


class Op(Generic[P, R]):
    """A registered op. Calling it dispatches to the best kernel for the arguments' device."""

    def __init__(
        self,
        reference: Callable[P, R],
        name: str,
        schema: str,
        validate: Callable[P, None] | None = None,
    ) -> None:
        functools.update_wrapper(self, reference)
        self.reference = reference  # the naive PyTorch body, callable directly
        self.name = name
        self.schema = schema
        self.validate = validate  # checks contents; calls do so with HYBRID_ENGINE_CHECK=1
        self.triton_keys: set[str] = set()  # the dispatch keys that a Triton launcher serves
        self.overload: Any = getattr(getattr(torch.ops, NAMESPACE), name).default

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if _CHECK == "1" and self.validate is not None and not _recording():
            self.validate(*args, **kwargs)
        return self.overload(*args, **kwargs)

    def implementation(self, device: str) -> str:
        """`native`, `triton` or `reference`: what runs on `device` ("cpu" or "cuda")."""
        if device.upper() in self.triton_keys:
            return "triton"
        qualified = f"{NAMESPACE}::{self.name}"
        native = torch._C._dispatch_has_kernel_for_dispatch_key(qualified, device.upper())
        return "native" if native else "reference"


def _recording() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


OPS: dict[str, Op[Any, Any]] = {}


def define_op(
    schema: str, *, fake: Callable[..., Any], validate: Callable[..., None] | None = None
) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Register the decorated function as the reference of the op with this schema.

    Args:
        schema: the part after the namespace, e.g. "relu(Tensor x) -> Tensor".
        fake: same parameters, returns empty tensors of the result's shape, dtype and device.
        validate: same parameters, raises ValueError for indices that lead out of memory. It waits
            for the device, so it runs only with HYBRID_ENGINE_CHECK=1, and not while a CUDA graph
            is recorded: there are no contents yet.
    """

    def register(reference: Callable[P, R]) -> Op[P, R]:
        name = schema[: schema.index("(")]
        _library.define(schema)
        _library.impl(name, reference, _DEFAULT_KEY)
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
        OPS[name] = Op(reference, name, schema, validate)
        return OPS[name]

    return register
