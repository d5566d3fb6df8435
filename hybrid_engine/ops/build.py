"""Compile `csrc/` with ninja, once per (sources, flags, compiler, torch), into a user cache.

The translation units use torch's stable ABI: no Python.h and no ATen, one or two seconds each, and
the library serves every Python and every torch from 2.10 on. One library holds one instruction set;
the loader picks the best that the machine has, so no binary ever mixes instruction sets.

The lock is a `flock`, which the kernel drops when its holder dies: a killed build blocks nobody.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# The source builds against torch 2.10 headers and later; see torch/csrc/stable.
TORCH_STABLE_TARGET = "0x020a000000000000"

# Best first. `default` is any x86-64, and whatever the compiler targets on other processors.
INSTRUCTION_SETS: dict[str, list[str]] = {
    "avx512": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "avx2": ["-march=x86-64-v3"],
    "default": [],
}

# Ampere and Hopper, with the instructions that only Hopper has.
CUDA_ARCHITECTURES = ("80", "90a")

# Not -ffast-math: linking with it makes gcc switch the whole process to flush-to-zero.
CPU_FLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp"]

# As PYBIND11_MODULE has it.
RUNTIME_MODULE = "hybrid_engine_runtime"

_ERROR_LINES = 20


class BuildError(RuntimeError):
    """The kernels could not be built; the message says why and what to do."""


@dataclass(frozen=True)
class Compilation:
    """One translation unit: `compiler flags -c source`."""

    source: Path
    command: tuple[str, ...]


def cpu_sources(csrc: Path) -> list[Path]:
    """The kernels, runtime and bindings that make the CPU library."""
    folders = ("cpu", "runtime", "bindings")
    return sorted(path for folder in folders for path in csrc.glob(f"{folder}/*.cpp"))


def build_cpu(csrc: Path, isa: str) -> Path:
    """Return the CPU library for `isa` (a key of INSTRUCTION_SETS), building it if needed.

    Raises BuildError when there is no compiler or the compilation fails.
    """
    compiler = find_compiler()
    flags = [*CPU_FLAGS, *INSTRUCTION_SETS[isa], *torch_compile_flags(csrc), "-DHE_DEVICE=cpu"]
    units = [Compilation(path, (compiler, *flags)) for path in cpu_sources(csrc)]
    link = [compiler, "-shared", "-fopenmp", *torch_link_flags()]
    return build(f"cpu_{isa}", csrc, units, link)


def build_runtime(csrc: Path, library: Path) -> Path:
    """Return the Python module of the runtime that is in the CPU library, building it if needed.

    It serves this Python alone. Raises BuildError as `build_cpu` does, and without pybind11.
    """
    compiler = find_compiler()
    flags = ["-O2", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-DHE_DEVICE=cpu", f"-I{csrc}"]
    for include in (sysconfig.get_path("include"), find_pybind11()):
        flags += ["-isystem", include]
    units = [Compilation(path, (compiler, *flags)) for path in sorted(csrc.glob("python/*.cpp"))]
    # The library's path is part of the module, so that the loader finds the one already loaded.
    return build(RUNTIME_MODULE, csrc, units, [compiler, "-shared", str(library)])


def cuda_sources(csrc: Path) -> list[Path]:
    """The kernels and bindings that make the CUDA library."""
    return [*sorted(csrc.glob("cuda/*.cu")), *sorted(csrc.glob("bindings/*.cpp"))]


def build_cuda(csrc: Path) -> Path:
    """Return the CUDA library for CUDA_ARCHITECTURES, building it if needed.

    It holds the CUDA runtime and loads where there is no GPU. The build log beside it has the
    registers and spills of every kernel. Raises BuildError without nvcc, or if it fails.
    """
    nvcc, compiler = find_nvcc(), find_compiler()
    host = [*torch_compile_flags(csrc), "-O3", "-DHE_DEVICE=cuda"]
    device = ["-ccbin", compiler, "-std=c++17", "-O3", "-DHE_DEVICE=cuda", f"-I{csrc}"]
    device += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v", "--threads", "2"]
    for architecture in CUDA_ARCHITECTURES:
        device += ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    commands = {".cu": (nvcc, *device), ".cpp": (compiler, *host)}
    units = [Compilation(path, commands[path.suffix]) for path in cuda_sources(csrc)]
    # nvcc knows where its runtime lies. The runtime's symbols stay hidden, so that they are not
    # mixed up with torch's own copy.
    link = [nvcc, "-shared", "-ccbin", compiler, "-cudart", "static", *torch_link_flags()]
    link += ["-Xlinker", "--exclude-libs,ALL"]
    return build("cuda", csrc, units, link)


def find_nvcc() -> str:
    """The CUDA compiler: of $CUDA_HOME, else on PATH, else of /usr/local/cuda."""
    toolkit = os.environ.get("CUDA_HOME")
    for name in (toolkit and f"{toolkit}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc"):
        if name and (path := shutil.which(name)):
            return path
    raise BuildError(
        "no nvcc found (looked in $CUDA_HOME/bin, on PATH, in /usr/local/cuda/bin). Install the "
        "CUDA toolkit and point CUDA_HOME at it, or set HYBRID_ENGINE_NATIVE=off to use the "
        "PyTorch reference, which is many times slower"
    )


def find_compiler() -> str:
    """The C++ compiler: $CXX, else g++, c++ or clang++ on PATH."""
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise BuildError(
        "no C++ compiler found (looked for $CXX, g++, c++, clang++). Install g++ 11 or newer, or "
        "set HYBRID_ENGINE_NATIVE=off to use the PyTorch reference, which is many times slower"
    )


def find_ninja() -> str:
    """The ninja of the Python package, which need not be on PATH, else the one on PATH."""
    try:
        import ninja

        bundled = Path(ninja.BIN_DIR) / "ninja"
        if bundled.exists():
            return str(bundled)
    except ImportError:
        pass
    if path := shutil.which("ninja"):
        return path
    raise BuildError("ninja is missing: pip install ninja")


def find_pybind11() -> str:
    """The headers of the Python package."""
    try:
        import pybind11
    except ImportError as error:
        raise BuildError("pybind11 is missing: pip install pybind11") from error
    return str(pybind11.get_include())


def torch_compile_flags(csrc: Path) -> list[str]:
    include = _torch_directory() / "include"
    return [
        "-std=c++17",
        "-fPIC",
        "-fvisibility=hidden",
        f"-DTORCH_TARGET_VERSION={TORCH_STABLE_TARGET}",
        "-isystem",
        str(include),
        f"-I{csrc}",
    ]


def torch_link_flags() -> list[str]:
    """libtorch is named outright: Python loads it privately, so nothing resolves by itself."""
    return [
        f"-L{_torch_directory() / 'lib'}",
        "-Xlinker",
        "--no-as-needed",
        "-ltorch",
        "-ltorch_cpu",
    ]


def cache_directory() -> Path:
    """$HYBRID_ENGINE_CACHE_DIR, else hybrid_engine under $XDG_CACHE_HOME or ~/.cache."""
    if explicit := os.environ.get("HYBRID_ENGINE_CACHE_DIR"):
        return Path(explicit)
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "hybrid_engine"
    try:
        return Path.home() / ".cache" / "hybrid_engine"
    except RuntimeError as error:  # a container's user that no file knows
        raise BuildError(
            "there is no home directory for the kernel cache: point HYBRID_ENGINE_CACHE_DIR at a "
            "writable folder"
        ) from error


def build(name: str, csrc: Path, units: list[Compilation], link: list[str]) -> Path:
    """Compile `units`, link them, and return the library; a finished one is returned at once."""
    directory = cache_directory() / f"{name}-{_content_key(csrc, units, link)}"
    library = directory / f"{name}.so"
    if library.exists():
        return library
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with _lock(directory):
            if not library.exists():
                _compile(directory, library, units, link)
    except OSError as error:
        raise BuildError(
            f"cannot write the kernel cache {directory}: {error}. Free some space, or point "
            "HYBRID_ENGINE_CACHE_DIR at a writable folder"
        ) from error
    return library


def _compile(directory: Path, library: Path, units: list[Compilation], link: list[str]) -> None:
    start = time.monotonic()
    _say(f"compiling {len(units)} kernel sources, once, into {directory}")
    # A builder that was killed leaves its folder, and perhaps a compiler still at work in it.
    for leftover in directory.glob("unfinished-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    unfinished = directory / f"unfinished-{os.getpid()}"
    unfinished.mkdir()
    (unfinished / "build.ninja").write_text(_ninja_file(units, link, library.name))
    log_path = directory / "build.log"
    with log_path.open("w") as log:
        status = _run_ninja(unfinished, log)
    if status != 0:
        lines = _first_error(log_path.read_text())
        raise BuildError(f"the kernels do not compile; whole log: {log_path}\n{lines}")
    os.replace(unfinished / library.name, library)
    shutil.rmtree(unfinished)
    _say(f"built in {time.monotonic() - start:.1f} s")


def _run_ninja(directory: Path, log) -> int:  # type: ignore[no-untyped-def]
    command = [find_ninja(), "-C", str(directory)]
    if jobs := os.environ.get("MAX_JOBS"):
        command += ["-j", jobs]
    environment = {**os.environ, "NINJA_STATUS": "[%f/%t] "}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            log.write(line)
            if line.startswith("["):
                _say("  " + line.rstrip())
    return process.returncode


def _ninja_file(units: list[Compilation], link: list[str], output: str) -> str:
    """One rule for all: each edge carries its own command."""
    lines = ["rule run", "  command = $command", "  description = $what", ""]
    objects = []
    for unit in units:
        target = f"{unit.source.parent.name}_{unit.source.stem}.o"
        objects.append(target)
        command = " ".join(
            [*map(_quote, unit.command), "-c", _quote(str(unit.source)), "-o", target]
        )
        lines += _edge(
            target, str(unit.source), command, f"{unit.source.parent.name}/{unit.source.name}"
        )
    command = " ".join([*map(_quote, link[:1]), *objects, *map(_quote, link[1:]), "-o", output])
    lines += _edge(output, " ".join(objects), command, "link")
    return "\n".join(lines) + "\n"


def _edge(target: str, inputs: str, command: str, what: str) -> list[str]:
    inputs = inputs.replace(":", "$:")
    return [f"build {target}: run {inputs}", f"  command = {command}", f"  what = {what}"]


def _quote(word: str) -> str:
    escaped = word.replace("$", "$$")
    return f"'{escaped}'" if " " in escaped else escaped


def _first_error(log: str) -> str:
    lines = log.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("FAILED")), 0)
    return "\n".join(lines[start : start + _ERROR_LINES])


def _content_key(csrc: Path, units: list[Compilation], link: list[str]) -> str:
    import torch

    compilers = sorted({unit.command[0] for unit in units} | {link[0]})
    digest = hashlib.sha256()
    headers = _headers({csrc, csrc / "runtime", *(unit.source.parent for unit in units)})
    for path in sorted({*(unit.source for unit in units), *headers}):
        digest.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes())
    commands = [(unit.source.name, unit.command) for unit in units]
    versions = [_version(compiler) for compiler in compilers]
    digest.update(repr((commands, link, versions, torch.__version__, platform.machine())).encode())
    return digest.hexdigest()[:16]


def _headers(folders: set[Path]) -> Iterator[Path]:
    for folder in folders:
        yield from folder.glob("*.h")
        yield from folder.glob("*.cuh")


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout


@contextlib.contextmanager
def _lock(directory: Path) -> Iterator[None]:
    with (directory / "lock").open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _say(f"waiting for another process that builds {directory}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _torch_directory() -> Path:
    import torch

    return Path(torch.__file__).parent


def _say(message: str) -> None:
    print(f"[hybrid_engine] {message}", file=sys.stderr, flush=True)
