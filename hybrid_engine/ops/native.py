"""Load the native kernels, by the policy in HYBRID_ENGINE_NATIVE.

`auto` (the default) builds and loads them, and when that fails warns once with the reason and
leaves the PyTorch reference in place; `require` raises instead; `off` never tries.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from hybrid_engine.ops import build

POLICIES = ("auto", "require", "off")


@dataclass(frozen=True)
class NativeStatus:
    """What was loaded, or why not."""

    library: Path | None  # the loaded CPU library
    isa: str | None  # its instruction set, a key of build.INSTRUCTION_SETS
    reason: str | None  # why there is none


def source_directory() -> Path:
    """`csrc/`: inside the package when installed from a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_csrc"
    return installed if installed.exists() else package.parent / "csrc"


def machine_isa() -> str:
    """The best instruction set here; ATEN_CPU_CAPABILITY lowers it, as it does torch's own."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(capability, "default")


def load() -> NativeStatus:
    """Build if needed and load the CPU library. Called once, at the import of the ops."""
    policy = os.environ.get("HYBRID_ENGINE_NATIVE", "auto")
    if policy not in POLICIES:
        raise ValueError(f"HYBRID_ENGINE_NATIVE={policy!r}: expected one of {', '.join(POLICIES)}")
    if policy == "off":
        return NativeStatus(None, None, "HYBRID_ENGINE_NATIVE=off")
    isa = machine_isa()
    prebuilt = Path(__file__).with_name(f"prebuilt_cpu_{isa}.so")
    try:
        library = prebuilt if prebuilt.exists() else build.build_cpu(source_directory(), isa)
        torch.ops.load_library(str(library))
    except (build.BuildError, OSError) as error:
        if policy == "require":
            raise
        warnings.warn(
            f"hybrid_engine runs on its PyTorch reference, many times slower, because: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return NativeStatus(None, None, str(error))
    return NativeStatus(library, isa, None)
