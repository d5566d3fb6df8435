"""Collects the benchmarks for pytest; reports ratios to the baseline, bandwidth, a JSON record.

A benchmark leaves in `benchmark.extra_info`: op, baseline_us, ours_us, spread_us, bytes (read or
written once by an ideal implementation) and cold (whether its operands are beyond the caches).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.bench.baseline import compare, read_baseline, write_baseline
from rlhf.bench.measure import geometric_mean, machine, read_bandwidth

BENCHMARKS = ("ops.py", "regressions.py")  # the other files are commands
BASELINE = Path(__file__).with_name("baseline.json")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-baseline", action="store_true", help=f"write the ratios to {BASELINE.name}"
    )
    parser.addoption("--record", type=Path, help="file for the JSON record")


def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_quiet = True  # the table below replaces pytest-benchmark's
    torch.set_num_threads(min(torch.get_num_threads(), os.cpu_count() or 1))


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    ours = file_path.parent == Path(__file__).parent and file_path.name in BENCHMARKS
    if ours and not parent.session.isinitpath(file_path):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    records = [
        {"name": bench.name.split("[")[1].rstrip("]"), **bench.extra_info}
        for bench in config._benchmarksession.benchmarks  # type: ignore[attr-defined]
        if "baseline_us" in bench.extra_info
    ]
    if not records:
        return
    peak = read_bandwidth() / 1e9
    header = machine(read_GBps=round(peak, 1))
    write = terminalreporter.write_line
    write("")
    write("  ".join(f"{key}={value}" for key, value in header.items()))
    columns = ("case", "ours us", "+-", "torch us", "ratio", "GB/s", "% of read")
    write("{:<46}{:>10}{:>8}{:>11}{:>8}{:>8}{:>11}".format(*columns))
    for r in records:
        r["ratio"] = r["baseline_us"] / r["ours_us"]
        r["GBps"] = r["bytes"] / r["ours_us"] / 1e3
        share = f"{100 * r['GBps'] / peak:.0f}" if r["cold"] else "in cache"
        write(
            f"{r['name']:<46}{r['ours_us']:>10.1f}{r['spread_us']:>8.1f}{r['baseline_us']:>11.1f}"
            f"{r['ratio']:>8.2f}{r['GBps']:>8.1f}{share:>11}"
        )
    write("")
    by_op: dict[str, list[float]] = {}
    for r in records:
        by_op.setdefault(r["op"], []).append(r["ratio"])
    for op, ratios in by_op.items():
        write(f"{op:<24} geometric mean {geometric_mean(ratios):6.2f}  least {min(ratios):6.2f}")
    overall = geometric_mean([r["ratio"] for r in records])
    slower = [f"{r['name']} ({r['ratio']:.2f})" for r in records if r["ratio"] < 1]
    write(f"all: geometric mean {overall:.2f} over {len(records)} cases")
    write(f"slower than torch: {', '.join(slower) or 'none'}")
    write("")
    if regressed(write, {case: geometric_mean(by_op[case]) for case in by_op}, header, config):
        terminalreporter._session.exitstatus = pytest.ExitCode.TESTS_FAILED
    record = json.dumps({**header, "geometric_mean": round(overall, 3), "cases": records})
    write(record)
    if path := config.getoption("--record"):
        path.write_text(record)


def regressed(
    write: Callable[[str], None], ratios: dict[str, float], header: Any, config: pytest.Config
) -> bool:
    """Show each family's mean ratio beside the committed one, or commit it as it is now."""
    changes = compare(read_baseline(BASELINE), ratios)
    write("{:<24}{:>10}{:>8}".format("mean ratio", "baseline", "now"))
    for change in changes:
        then, now = (f"{x:.2f}" if x is not None else "" for x in (change.before, change.now))
        write(f"{change.case:<24}{then:>10}{now:>8}  {change.verdict}")
    if config.getoption("--update-baseline"):
        write_baseline(BASELINE, ratios, header)
        write(f"written: {BASELINE}")
        return False
    return any(change.regressed for change in changes)
