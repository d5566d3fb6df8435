"""`rlhf bench ops`: the op benchmarks of the checkout, on this machine's CPU or GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run_ops(words: str | None, output: str | None) -> None:
    """Run the cases of `benchmarks/` whose names have all the words; None: all of them.

    The record is the last line of the output, and with a folder in it as ops.json and ops.png.
    Raises ValueError without a checkout, or when a case fails.
    """
    if not (BENCHMARKS / "ops.py").exists():
        raise ValueError(f"the op benchmarks are part of the repository, and not in {BENCHMARKS}")
    record = None if output is None else Path(output).resolve() / "ops.json"
    if record:
        record.parent.mkdir(parents=True, exist_ok=True)
    wanted = [word for word in (words or "").split() if word != "and"]
    command = (on_gpu if torch.cuda.is_available() else on_cpu)(wanted, record)
    done = subprocess.run([sys.executable, *command], cwd=BENCHMARKS.parent)
    if done.returncode:
        raise ValueError(f"the op benchmarks ended with {done.returncode}, see above")
    if record:
        from rlhf.bench.show import plot_ops

        plot_ops(json.loads(record.read_text()), record.with_suffix(".png"))
        print(f"written: {record}, {record.with_suffix('.png')}")


def on_cpu(words: list[str], record: Path | None) -> list[str]:
    """Arguments of Python."""
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/ops.py"]
    command += ["-k", " and ".join(words)] if words else []
    return [*command, *(["--record", str(record)] if record else [])]


def on_gpu(words: list[str], record: Path | None) -> list[str]:
    """Arguments of Python."""
    return ["-m", "benchmarks.gpu.ops", str(record or "-"), *words]
