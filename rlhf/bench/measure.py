"""What every benchmark shares: who measured, how fast memory is, and taking turns.

A figure without the machine, the versions and the commit cannot be compared with anything, and two
figures taken one after the other on a shared machine are not a ratio: contenders alternate.
"""

from __future__ import annotations

import gc
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf.tracking import synchronize

PROBE_BYTES = 1 << 30  # beyond any cache
PACKAGES = (
    "torch", "triton", "transformers", "accelerate", "deepspeed", "peft", "trl", "ctranslate2",
    "vllm",
)  # fmt: skip
GPU_READS = 16  # of a timed call: launching one and waiting for it takes as long as reading some MB


@dataclass(frozen=True)
class Timing:
    """Seconds of the repeats of one call, warm-up excluded."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles; with two repeats, between the two."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / 2


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    *,
    repeats: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time each call `repeats` times, every repeat in turn over all calls, after `warmup` rounds.

    The order is reversed in every other round, so that none always runs in another's wake.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # as timeit does: one's garbage is not the next one's to collect
    try:
        for round_ in range(warmup + repeats):
            for name in list(calls)[:: 1 if round_ % 2 == 0 else -1]:
                synchronize()
                start = clock()
                calls[name]()
                synchronize()
                if round_ >= warmup:
                    seconds[name].append(clock() - start)
    finally:
        if collecting:
            gc.enable()
    return {name: Timing(tuple(times)) for name, times in seconds.items()}


def busy_clock() -> float:
    """Seconds; with one thread those of its processor, which a busy machine does not inflate."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def peers_clock() -> float:
    """Seconds; on a CPU with one thread those of the process, peers' own threads included."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.process_time() if alone else time.perf_counter()


def read_bandwidth(
    device: torch.device | str = "cpu",
    *,
    size: int | None = None,
    clock: Callable[[], float] = busy_clock,
) -> float:
    """The best rate, in bytes a second, at which torch reads `size` bytes (default: 1 GiB).

    The faster of a matrix-vector product and a norm: neither writes anything to speak of.
    """
    reads = GPU_READS if torch.device(device).type == "cuda" else 1
    matrix = torch.ones(max(1, (size or PROBE_BYTES) // 4 // 16384), 16384, device=device)
    vector = torch.ones(16384, device=device)
    best = math.inf
    for probe in (lambda: torch.mv(matrix, vector), lambda: torch.linalg.vector_norm(matrix)):
        calls = {"probe": lambda probe=probe: [probe() for _ in range(reads)]}
        best = min(best, *interleave(calls, repeats=8, clock=clock)["probe"].seconds)
    return reads * matrix.numel() * matrix.itemsize / best


def matmul_rate(device: torch.device | str, dtype: torch.dtype) -> float:
    """The best FLOP/s of torch's product of two square matrices of the dtype."""
    size = 8192 if torch.device(device).type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timing = interleave({"product": lambda: a @ b}, repeats=8, clock=busy_clock)["product"]
    return 2 * size**3 / min(timing.seconds)


def machine(**more: Any) -> dict[str, Any]:
    """The header of a record: hardware, versions, commit and load, then what is given."""
    from hybrid_engine import ops

    return {
        "processor": processor(),
        **gpu(),
        "threads": torch.get_num_threads(),
        "kernels": ops.NATIVE.isa or "reference",
        "python": platform.python_version(),
        "versions": versions(PACKAGES),
        "commit": commit(),
        "load": round(os.getloadavg()[0], 1),
        "date": time.strftime("%Y-%m-%d"),
        **more,
    }


def gpu() -> dict[str, Any]:
    """Name, size, driver and CUDA version of the current GPU; without one, that there is none."""
    if not torch.cuda.is_available():
        return {"gpu": None}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm", "--format=csv,noheader"]
    return {
        "gpu": properties.name,
        "gpu_GB": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "driver": output_of(query) or "unknown",
    }


def output_of(command: list[str]) -> str | None:
    """What a command prints; None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The installed ones among the packages."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """Of the checkout that this file lies in, `-dirty` if it has changes; else the version."""
    found = output_of(["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"])
    return found or "hybrid-rlhf " + versions(["hybrid-rlhf"]).get("hybrid-rlhf", "unknown")


def geometric_mean(values: Iterable[float]) -> float:
    return statistics.geometric_mean(values)


def append_record(path: Path | str, record: Mapping[str, Any]) -> None:
    """One JSON record, on one line at the end of the file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(record) + "\n")


def read_records(path: Path | str) -> list[dict[str, Any]]:
    """The records of a file that `append_record` wrote."""
    return [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
