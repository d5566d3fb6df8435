"""The script for a machine with a GPU says so, and measures nothing, where there is none."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf.bench.peers import find_peer
from rlhf.cli.bench import bench_parser
from rlhf.plan.known import known_config
from tests.cuda.test_memory import FAMILIES, PROGRAMS

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks/gpu/run.sh"


def test_the_script_parses_and_wants_a_phase_and_a_folder(tmp_path: Path) -> None:
    subprocess.run(["bash", "-n", SCRIPT], check=True)
    for arguments in ([], ["generate"], ["everything", str(tmp_path)]):
        done = subprocess.run([SCRIPT, *arguments], capture_output=True, text=True)
        assert done.returncode == 2
        assert "{build|test|ops|generate|step|memory|all} FOLDER" in done.stderr


def test_every_benchmark_of_the_script_is_a_command_that_parses() -> None:
    """The options of each `rlhf bench` in it, read by the real parser."""
    text = SCRIPT.read_text().replace("\\\n", " ").replace("opt-$size", "opt-13b")
    (shape,) = re.findall(r'local shape="(.+)"', text)
    text = text.replace("$shape", shape)
    calls = re.findall(r"^ +bench \S+ (\d+) (.+)$", text, flags=re.MULTILINE)
    assert len(calls) == 11
    for _, options in calls:
        parsed = bench_parser().parse_args(shlex.split(options))
        assert all(known_config(model) for model in parsed.model.split(","))
        assert all(find_peer(peer) for peer in parsed.peers.split(","))


def test_every_family_of_kernels_is_watched() -> None:
    lists = re.findall(r'families="(.+)"$', SCRIPT.read_text(), re.MULTILINE)
    assert [tuple(names.split()) for names in lists] == list(PROGRAMS.values())
    assert sorted(FAMILIES) == sorted(path.stem for path in ROOT.glob("csrc/cuda/*.cu"))


def test_every_phase_ends_inside_ten_minutes() -> None:
    text = SCRIPT.read_text()
    for name in ("build", "test", "ops", "generate", "step", "memory", "all"):
        body = text.split(f"run_{name}() {{")[1].split("\n}\n")[0]
        limits = [int(n) for n in re.findall(r"^ +(?:part|bench) \S+ (\d+)", body, re.MULTILINE)]
        repeats = 3 if "for size in" in body else 1
        assert limits
        assert sum(limits[:-1]) + repeats * limits[-1] < 600, name


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_a_phase_says_so_and_leaves_a_summary(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [SCRIPT, "generate", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 3, done.stdout + done.stderr
    assert done.stdout.startswith("no GPU: nothing is measured\n")
    summary = json.loads((tmp_path / "generate.summary.json").read_text())
    assert summary["gpu"] is False
    assert [(part["name"], part["status"]) for part in summary["parts"]] == [("imports", 0)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_benchmark_refuses_without_a_gpu(tmp_path: Path) -> None:
    record = tmp_path / "ops.json"
    command = [sys.executable, "-m", "benchmarks.gpu.ops", str(record)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "no GPU: nothing was measured\n")
    assert not record.exists()
