"""Load the native kernels, by the policy in HYBRID_ENGINE_NATIVE.

`auto` (the default) builds and loads them, and when that fails warns once with the reason and
leaves the PyTorch reference in place; `require` raises instead; `off` never tries.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from hybrid_engine.ops import build

POLICIES = ("auto", "require", "off")


@dataclass(frozen=True)
class NativeStatus:
    """What was loaded, or why not."""

    library: Path | None  # the loaded CPU library
    isa: str | None  # its instruction set, a key of build.INSTRUCTION_SETS
    reason: str | None  # why there is none
    cuda_library: Path | None  # the loaded CUDA library
    cuda_reason: str | None  # why there is none
    runtime: Any = None  # a module: the decode step in one call, of the CPU library
    runtime_reason: str | None = None  # why there is none


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
    """Build if needed and load the libraries. Called once, at the import of the ops."""
    policy = os.environ.get("HYBRID_ENGINE_NATIVE", "auto")
    if policy not in POLICIES:
        raise ValueError(f"HYBRID_ENGINE_NATIVE={policy!r}: expected one of {', '.join(POLICIES)}")
    if policy == "off":
        off = "HYBRID_ENGINE_NATIVE=off"
        return NativeStatus(None, None, off, None, off, None, off)
    isa = machine_isa()
    library, reason = _load("the CPU", policy, lambda: _cpu_library(isa))
    if torch.cuda.is_available():
        cuda = _load("CUDA", policy, lambda: build.build_cuda(source_directory()))
    else:
        cuda = None, "torch sees no CUDA device"
    runtime: tuple[ModuleType | None, str | None] = None, reason
    if library:
        runtime = _load_runtime(policy, library)
    return NativeStatus(library, isa if library else None, reason, *cuda, *runtime)


def _load_runtime(policy: str, library: Path) -> tuple[ModuleType | None, str | None]:
    """The runtime's Python module, or why there is none."""
    try:
        path = build.build_runtime(source_directory(), library)
        loader = ExtensionFileLoader(build.RUNTIME_MODULE, str(path))
        spec = importlib.util.spec_from_file_location(build.RUNTIME_MODULE, path, loader=loader)
        assert spec is not None
        module = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
    except (build.BuildError, ImportError) as error:
        if policy == "require":
            raise
        warnings.warn(
            f"hybrid_engine decodes step by step in Python, some times slower, because: {error}",
            RuntimeWarning,
            stacklevel=3,
        )
        return None, str(error)
    return module, None


def _cpu_library(isa: str) -> Path:
    prebuilt = Path(__file__).with_name(f"prebuilt_cpu_{isa}.so")
    return prebuilt if prebuilt.exists() else build.build_cpu(source_directory(), isa)


def _load(device: str, policy: str, find: Callable[[], Path]) -> tuple[Path | None, str | None]:
    """The library that was loaded, or why none was."""
    try:
        library = find()
        torch.ops.load_library(str(library))
    except (build.BuildError, OSError) as error:
        if policy == "require":
            raise
        warnings.warn(
            f"hybrid_engine runs on its PyTorch reference on {device}, many times slower, "
            f"because: {error}",
            RuntimeWarning,
            stacklevel=3,
        )
        return None, str(error)
    return library, None
