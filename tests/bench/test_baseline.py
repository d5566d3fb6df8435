"""Ratios then and now."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from rlhf.bench.baseline import compare, read_baseline, write_baseline

ROOT = Path(__file__).parents[2]


def test_a_fall_under_three_quarters_is_a_regression() -> None:
    changes = compare({"a": 4.0, "b": 4.0, "c": 1.0}, {"a": 3.01, "b": 2.99, "d": 9.0})
    verdicts = {change.case: change.verdict for change in changes}
    assert verdicts == {"a": "ok", "b": "REGRESSED, under 3.00", "d": "new", "c": "not run"}
    assert [change.case for change in changes if change.regressed] == ["b"]


def test_writing_keeps_what_was_not_run(tmp_path: Path) -> None:
    path = tmp_path / "baseline.json"
    assert read_baseline(path) == {}
    write_baseline(path, {"a": 1.23456, "b": 2.0}, {"commit": "one"})
    write_baseline(path, {"a": 3.0}, {"commit": "two"})
    assert read_baseline(path) == {"a": 3.0, "b": 2.0}
    assert json.loads(path.read_text())["machine"] == {"commit": "two"}


def test_the_committed_baseline_has_ops_rollouts_and_iterations() -> None:
    ratios = read_baseline(ROOT / "benchmarks/baseline.json")
    assert {"rollout", "ppo iteration", "decode_attention", "sample"} <= set(ratios)
    assert all(ratio > 0 for ratio in ratios.values())


def test_make_bench_finds_its_cases() -> None:
    """Those of ops, rollouts and an iteration, and none of the files that are commands."""
    command = [sys.executable, "-m", "pytest", "benchmarks", "--collect-only", "-q"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
    files = {line.split("::")[0] for line in found.stdout.splitlines() if "::" in line}
    assert files == {"benchmarks/ops.py", "benchmarks/regressions.py"}
