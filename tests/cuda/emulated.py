"""The CUDA kernels of an op family, executed on the CPU, behind the call of the op."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from hybrid_engine import ops
from tests.cuda_emulator.build import CSRC, Schedule, build_emulated, scheduled

NAMESPACE = "hybrid_engine_emulated"
_schemas: list[torch.library.Library] = []  # kept: an op lives as long as its library


@cache
def emulate(family: str) -> Path:
    """Build and load `csrc/cuda/{family}.cu` and its binding, under the schemas of the ops."""
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for op in ops.OPS.values():
        if op.reference.__module__ == f"hybrid_engine.ops.{family}":
            library.define(op.schema)
    _schemas.append(library)
    path = build_emulated([CSRC / f"cuda/{family}.cu", CSRC / f"bindings/{family}.cpp"])
    torch.ops.load_library(str(path))
    return path


@dataclass(frozen=True)
class Emulated:
    """Runs ops of one family under one schedule: `run(op, *args)`."""

    library: Path
    schedule: Schedule

    def __call__(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        with scheduled(self.library, self.schedule):
            return getattr(getattr(torch.ops, NAMESPACE), op.name)(*args, **kwargs)
