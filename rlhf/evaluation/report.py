"""The report at the end of a run: Markdown, JSON, curves, and the table on the terminal."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from rlhf.evaluation.policy import PolicyEvaluation
from rlhf.evaluation.throughput import Throughput
from rlhf.files import finished_file

History = Sequence[dict[str, float]]


@dataclass
class RunReport:
    """What the steps hand over; steps that were not run are None."""

    parameters: int = 0
    seconds: dict[str, float] = field(default_factory=dict)  # wall time of each step
    sft: dict[str, float] | None = None
    reward: dict[str, float] | None = None
    dpo: dict[str, float] | None = None
    # of the reward model, held out: how sure it is, how often right then, of how many pairs
    calibration: list[tuple[float, float, int]] = field(default_factory=list)
    before: PolicyEvaluation | None = None
    after: PolicyEvaluation | None = None
    throughput: Throughput | None = None
    samples: list[tuple[str, str, str]] = field(default_factory=list)  # prompt, before, after
    histories: dict[str, History] = field(default_factory=dict)  # step -> metrics


def write_report(
    report: RunReport, folder: Path, console: Console, *, name: str = "report"
) -> None:
    """Write the report as <name>.md, .json and .png (the curves), and print the summary."""
    rows = summary_rows(report)
    path = folder / f"{name}.md"
    plot_curves(report.histories, path.with_suffix(".png"), calibration=report.calibration)
    _write(path.with_suffix(".json"), json.dumps(_record(report), indent=2) + "\n")
    _write(path, _markdown(report, rows, name))
    table = Table(title="summary")
    table.add_column("figure")
    table.add_column("value", justify="right")
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)
    console.print(f"report: {path}", soft_wrap=True)


def summary_rows(report: RunReport) -> list[tuple[str, str]]:
    """(name, value) in the order of the pipeline."""
    rows = [("parameters", f"{report.parameters / 1e6:.2f} M")]
    if report.sft:
        rows.append(("SFT loss, held out", f"{report.sft['eval/loss']:.3f}"))
    if report.reward:
        rows.append(("reward accuracy, held out", f"{report.reward['eval/accuracy']:.3f}"))
        rows.append(("reward margin, held out", f"{report.reward['eval/margin']:.3f}"))
    if report.calibration:
        error = _calibration_error(report.calibration)
        rows.append(("reward calibration error, held out", f"{error:.3f}"))
    if report.dpo:
        accuracy, margin = report.dpo["eval/rewards/accuracies"], report.dpo["eval/rewards/margins"]
        rows.append(("DPO accuracy, held out", f"{accuracy:.3f}"))
        rows.append(("DPO margin, held out, nats times beta", f"{margin:.3f}"))
    if report.before and report.after:
        before, after = report.before, report.after
        change = f"SFT -> {_method(report)}"
        rows.append((f"reward score, {change}", f"{before.score:.2f} -> {after.score:.2f}"))
        if before.quality is not None and after.quality is not None:
            gain = after.quality - before.quality
            rows.append(
                (
                    f"true quality, {change}",
                    f"{before.quality:.3f} -> {after.quality:.3f} ({gain:+.3f})",
                )
            )
        rows.append(("KL from SFT, nats per response", f"{after.kl:.2f}"))
        rows.append((f"response length, {change}", f"{before.length:.1f} -> {after.length:.1f}"))
    if report.throughput:
        speed = report.throughput
        rows.append(("rollout tokens/s", f"{speed.engine:,.0f}"))
        rows.append(("HF generate tokens/s", f"{speed.hf_generate:,.0f}"))
        rows.append(("rollout over HF generate", f"{speed.ratio:.1f}x"))
    rows += [(f"{name}, seconds", f"{value:.1f}") for name, value in report.seconds.items()]
    rows.append(("total, seconds", f"{sum(report.seconds.values()):.1f}"))
    return rows


def plot_curves(
    histories: dict[str, History],
    path: Path,
    *,
    calibration: Sequence[tuple[float, float, int]] = (),
) -> None:
    """One panel for each curve worth seeing, and one for the reward model's calibration."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = [
        ("sft", "loss", "SFT: loss"),
        ("reward", "accuracy", "reward model: batch accuracy"),
        ("dpo", "loss", "DPO: loss"),
        ("dpo", "rewards/accuracies", "DPO: batch accuracy"),
        ("dpo", "rewards/margins", "DPO: margin of implicit rewards"),
        ("ppo", "objective/scores", "PPO: reward score"),
        ("ppo", "objective/kl", "PPO: KL from SFT, nats per response"),
        ("ppo", "policy/entropy_avg", "PPO: entropy, nats per token"),
        ("ppo", "loss/value_avg", "PPO: value loss"),
    ]
    shown = [curve for curve in curves if histories.get(curve[0])]
    panels = len(shown) + bool(calibration)
    columns = min(3, max(1, panels))
    lines = max(1, math.ceil(panels / columns))
    figure, axes = plt.subplots(lines, columns, figsize=(4.5 * columns, 3.2 * lines), squeeze=False)
    for axis in axes.flat[panels:]:
        axis.remove()
    if calibration:
        _plot_calibration(axes.flat[len(shown)], calibration)
    for axis, (step, metric, title) in zip(axes.flat, shown, strict=False):
        steps = [record["step"] for record in histories[step]]
        values = [record[metric] for record in histories[step]]
        axis.plot(steps, values, color="C0", alpha=0.3, linewidth=0.8)
        axis.plot(steps, _smooth(values), color="C0", linewidth=1.5)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("PPO iteration" if step == "ppo" else "optimizer step", fontsize=8)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    with finished_file(path) as unfinished:
        figure.savefig(unfinished, dpi=120, format="png")
    plt.close(figure)


def _plot_calibration(axis: Any, calibration: Sequence[tuple[float, float, int]]) -> None:
    sure, right, pairs = zip(*calibration, strict=True)
    axis.plot([0.5, 1], [0.5, 1], color="0.6", linewidth=0.8, linestyle="--")
    axis.scatter(sure, right, s=[10 + 200 * n / sum(pairs) for n in pairs], color="C0")
    axis.set_title("reward model: calibration, held out", fontsize=10)
    axis.set_xlabel("probability that it gives", fontsize=8)
    axis.set_ylabel("share ranked right", fontsize=8)
    axis.grid(alpha=0.3)


def _calibration_error(calibration: Sequence[tuple[float, float, int]]) -> float:
    """The mean distance of probability and share, weighted by pairs: arXiv 1706.04599, eq. 3."""
    pairs = sum(n for _, _, n in calibration)
    return sum(n * abs(sure - right) for sure, right, n in calibration) / pairs


def _method(report: RunReport) -> str:
    return "DPO" if report.dpo else "PPO"


def _write(path: Path, text: str) -> None:
    with finished_file(path) as unfinished:
        unfinished.write_text(text)


def _smooth(values: list[float]) -> list[float]:
    """The mean over the last twentieth of the run before each point."""
    width = max(1, len(values) // 20)
    windows = (values[max(0, i - width + 1) : i + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _markdown(report: RunReport, rows: list[tuple[str, str]], name: str) -> str:
    lines = ["# Report", "", "| figure | value |", "|---|---:|"]
    lines += [f"| {name} | {value} |" for name, value in rows]
    lines += ["", f"Machine: {_machine()}.", "", f"![curves]({name}.png)"]
    if report.samples:
        lines += ["", f"## Held-out prompts, answered before and after {_method(report)}"]
    for prompt, before, after in report.samples:
        lines += ["", "```", prompt, f"  SFT: {before}", f"  {_method(report)}: {after}", "```"]
    return "\n".join(lines) + "\n"


def _record(report: RunReport) -> dict[str, object]:
    record = dataclasses.asdict(report)
    record.pop("histories")
    for name in ("before", "after"):
        if record[name]:
            for column in ("completions", "scores", "lengths"):
                record[name].pop(column)
    if report.throughput:
        record["throughput"]["ratio"] = report.throughput.ratio
    return {**record, "machine": _machine()}


def _machine() -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _cpu_name()
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    return names[0] if names else platform.processor() or platform.machine()
