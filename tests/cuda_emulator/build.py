"""Compile `.cu` files for the emulator, once for each content, flags and compiler.

Objects and libraries lie in the kernel cache under the hash of all that went into them, so a change
in one kernel file compiles that file again and links.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from hybrid_engine.ops.build import (
    BuildError,
    cache_directory,
    torch_compile_flags,
    torch_link_flags,
)

EMULATOR = Path(__file__).resolve().parent
CSRC = EMULATOR.parents[1] / "csrc"
RUNTIME = sorted(EMULATOR.glob("*.cpp"))

FLAGS = [
    "-O2",
    "-g1",
    "-std=c++17",
    "-fPIC",
    # Two emulated libraries in one process must not share their kernels or their state.
    "-fvisibility=hidden",
    "-fno-gnu-unique",
    # Without it a block-scope `extern thread_local` calls an initialiser that does not exist.
    "-fno-extern-tls-init",
    # Kernels read halves through uint4 pointers; nvcc allows it.
    "-fno-strict-aliasing",
    "-Wno-unknown-pragmas",
    "-DHE_CUDA_EMULATOR",
    "-DHE_DEVICE=cuda",
    f"-I{EMULATOR}",
    f"-I{CSRC}",
]
# Reported by runtime_checks.cpp, so nothing of libubsan is linked.
KERNEL_FLAGS = ["-x", "c++", "-fsanitize=alignment,bounds"]

_ERROR_LINES = 20

ORDERS = ("forward", "reverse", "random", "greedy")
ASYNC_POLICIES = ("late", "eager")


@dataclass(frozen=True)
class Schedule:
    """Whose turn it is when threads may run in any order, and when a cp.async arrives."""

    order: str  # one of ORDERS
    async_policy: str = "late"  # one of ASYNC_POLICIES
    seed: int = 0  # of the random and greedy orders

    def __str__(self) -> str:
        return f"{self.order}-{self.async_policy}"


# What an op test runs under: every order, and both policies with the two extreme orders.
SCHEDULES = (
    Schedule("forward", "late"),
    Schedule("reverse", "eager"),
    Schedule("random", "late", seed=1),
    Schedule("greedy", "late", seed=1),
    Schedule("greedy", "eager", seed=2),
)


@contextmanager
def scheduled(library: Path, schedule: Schedule) -> Iterator[None]:
    """Run the launches of an emulated library under `schedule`; afterwards in forward order."""
    _configure(library, schedule)
    try:
        yield
    finally:
        _configure(library, Schedule("forward"))


def build_emulated(sources: Sequence[Path], extra_flags: Sequence[str] = ()) -> Path:
    """Return a shared library of kernels (`.cu`) and op bindings (`.cpp`), building it if needed.

    With a `.cpp` among the sources the library links torch: load it by `torch.ops.load_library`.
    Raises BuildError with the first lines of the compiler's complaint.
    """
    objects = _compile_all(sources, extra_flags)
    bindings = any(source.suffix == ".cpp" for source in sources)
    # -z defs: a function of the CUDA runtime that grid.cpp lacks is an error here, with its name.
    flags = ["-shared", "-Wl,-z,defs", *extra_flags]
    return _link(objects, [*flags, *(torch_link_flags() if bindings else [])])


def build_program(sources: Sequence[Path], extra_flags: Sequence[str] = ()) -> Path:
    """Return an executable of `.cu` files, one with `main`: sanitizers must own the process."""
    return _link(_compile_all(sources, extra_flags), list(extra_flags))


@cache
def cuda_include_directory() -> Path | None:
    """The CUDA headers of the toolkit, else of the nvidia-cuda-* packages on PyPI, else None."""
    candidates = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    if spec := importlib.util.find_spec("nvidia"):
        for package in spec.submodule_search_locations or []:
            candidates += [Path(package) / "cu13" / "include"]
    needed = ("cuda_bf16.h", "cuda_fp16.h", "cuda_runtime_api.h", "crt/host_defines.h")
    return next(
        (path for path in candidates if all((path / name).exists() for name in needed)), None
    )


def why_unavailable() -> str | None:
    """Why this machine cannot emulate, as the reason for a skip; None if it can."""
    if platform.machine() != "x86_64":
        return "the emulator switches stacks in x86-64 assembly"
    if shutil.which("g++") is None:
        return "the emulator needs g++"
    if cuda_include_directory() is None:
        return (
            "no CUDA headers in CUDA_HOME or /usr/local/cuda: pip install "
            "nvidia-cuda-runtime==13.0.* nvidia-cuda-crt==13.0.* nvidia-cuda-cccl==13.0.*"
        )
    return None


def _configure(library: Path, schedule: Schedule) -> None:
    status = ctypes.CDLL(str(library)).he_emulator_configure(
        ORDERS.index(schedule.order),
        ctypes.c_uint64(schedule.seed),
        ASYNC_POLICIES.index(schedule.async_policy),
    )
    assert status == 0, f"the emulator refused {schedule}"


def _compile_all(sources: Sequence[Path], extra_flags: Sequence[str]) -> list[Path]:
    runtime_flags = [*FLAGS, *extra_flags]
    if "-fsanitize=thread" in extra_flags:
        # The runtime tells ThreadSanitizer what to think of the kernels; see sanitizers.h.
        runtime_flags += ["-fno-sanitize=thread", "-DHE_EMULATOR_TSAN"]
    objects = [_compile(source, runtime_flags) for source in RUNTIME]
    for source in sources:
        kind = KERNEL_FLAGS if source.suffix == ".cu" else torch_compile_flags(CSRC)
        objects.append(_compile(source, [*FLAGS, *kind, *extra_flags]))
    return objects


def _compile(source: Path, flags: list[str]) -> Path:
    cuda = cuda_include_directory()
    includes = [str(path) for path in (cuda, cuda and cuda / "cccl") if path and path.exists()]
    command = ["g++", *flags, *(f"-isystem{path}" for path in includes)]
    key = _hash(_headers(), source.read_bytes(), repr(command).encode(), _compiler_version())
    return _make(f"{source.stem}-{key}.o", [*command, "-c", str(source)])


def _link(objects: list[Path], flags: list[str]) -> Path:
    key = _hash(repr([path.name for path in objects]).encode(), repr(flags).encode())
    name = f"{objects[-1].stem.rpartition('-')[0]}-{key}" + (".so" if "-shared" in flags else "")
    return _make(name, ["g++", *map(str, objects), *flags])


def _make(name: str, command: list[str]) -> Path:
    """Run `command -o name` in the cache unless it has been; atomic, so builders may race."""
    target = cache_directory() / "emulator" / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{os.getpid()}-{name}")
    done = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.splitlines()[:_ERROR_LINES]
        raise BuildError(f"cannot build {name}:\n" + "\n".join(lines))
    os.replace(unfinished, target)
    return target


def _hash(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part).digest())
    return digest.hexdigest()[:16]


def _headers() -> bytes:
    """Every header that a source may include, of the emulator and of csrc."""
    paths = [*EMULATOR.glob("*.h"), *CSRC.rglob("*.h"), *CSRC.rglob("*.cuh")]
    return b"".join(path.name.encode() + path.read_bytes() for path in sorted(paths))


@cache
def _compiler_version() -> bytes:
    return subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout
