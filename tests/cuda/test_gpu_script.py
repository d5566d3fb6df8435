"""The script for a machine with a GPU says so, and measures nothing, where there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks/gpu/run.sh"


def test_the_script_parses_and_wants_a_folder() -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    done = subprocess.run([SCRIPT], capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage:" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_refuses_without_a_gpu(tmp_path: Path) -> None:
    record = tmp_path / "ops.json"
    command = [sys.executable, "-m", "benchmarks.gpu.ops", str(record)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "no GPU: nothing was measured\n")
    assert not record.exists()
