"""`rlhf bench ops`: the op benchmarks of the checkout, on this machine's CPU or GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run_ops(words: str | None, output: str | None) -> None:
    """Run `benchmarks/`. Raises ValueError without a checkout, or when a case fails."""
    if not (BENCHMARKS / "ops.py").exists():
        raise ValueError(f"the op benchmarks are part of the repository, and not in {BENCHMARKS}")
    if torch.cuda.is_available():
        folder = Path(output or "runs/bench")
        folder.mkdir(parents=True, exist_ok=True)
        command = ["-m", "benchmarks.gpu.ops", str(folder.resolve() / "ops.json")]
    else:
        command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "benchmarks/ops.py"]
        command += ["-k", words] if words else []
    done = subprocess.run([sys.executable, *command], cwd=BENCHMARKS.parent)
    if done.returncode:
        raise ValueError(f"the op benchmarks ended with {done.returncode}, see above")
