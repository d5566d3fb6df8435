"""`define_op`: a schema, a naive PyTorch reference and a fake make an op.

The reference is the op's default on every device; a native library that is loaded later overrides
it where it has a kernel. So everything runs without a compiler, and every kernel has its truth
beside it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import torch

NAMESPACE = "hybrid_engine"
_DEFAULT_KEY = "CompositeExplicitAutograd"

P = ParamSpec("P")
R = TypeVar("R")

_library = torch.library.Library(NAMESPACE, "DEF")


class Op(Generic[P, R]):
    """A registered op. Calling it dispatches to the best kernel for the arguments' device."""

    def __init__(self, reference: Callable[P, R], name: str, schema: str) -> None:
        functools.update_wrapper(self, reference)
        self.reference = reference  # the naive PyTorch body, callable directly
        self.name = name
        self.schema = schema
        self.triton_keys: set[str] = set()  # the dispatch keys that a Triton launcher serves
        self.overload: Any = getattr(getattr(torch.ops, NAMESPACE), name).default

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.overload(*args, **kwargs)

    def implementation(self, device: str) -> str:
        """`native`, `triton` or `reference`: what runs on `device` ("cpu" or "cuda")."""
        if device.upper() in self.triton_keys:
            return "triton"
        qualified = f"{NAMESPACE}::{self.name}"
        native = torch._C._dispatch_has_kernel_for_dispatch_key(qualified, device.upper())
        return "native" if native else "reference"


OPS: dict[str, Op[Any, Any]] = {}


def define_op(schema: str, *, fake: Callable[..., Any]) -> Callable[[Callable[P, R]], Op[P, R]]:
    """Register the decorated function as the reference of the op with this schema.

    Args:
        schema: the part after the namespace, e.g. "relu(Tensor x) -> Tensor".
        fake: same parameters, returns empty tensors of the result's shape, dtype and device.
    """

    def register(reference: Callable[P, R]) -> Op[P, R]:
        name = schema[: schema.index("(")]
        _library.define(schema)
        _library.impl(name, reference, _DEFAULT_KEY)
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)
        OPS[name] = Op(reference, name, schema)
        return OPS[name]

    return register
