"""What `rlhf eval` leaves: eval.md, eval.json, eval.png, and the table on the terminal."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rlhf.evaluation.comparison import Comparison
from rlhf.evaluation.policy import PolicyEvaluation
from rlhf.files import finished_file, make_folder


def write_comparison(found: Comparison, folder: Path, console: Console, *, samples: int) -> None:
    """Write the three files and print the table. Raises OSError where they cannot be written."""
    make_folder(folder)
    header, rows = comparison_rows(found)
    plot_comparison(found, folder / "eval.png")
    _write(folder / "eval.json", json.dumps(_record(found), indent=2) + "\n")
    _write(folder / "eval.md", _markdown(found, header, rows, samples))
    table = Table(*header, title="rlhf eval")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    console.print(f"report: {folder / 'eval.md'}", soft_wrap=True)


def comparison_rows(found: Comparison) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a column for each policy."""
    policies = [found.a] if found.b is None else [found.a, found.b]
    header = ["figure", *"AB"[: len(policies)]]
    rows = [["model", *found.names]]
    for name, field, digits in (
        ("reward", "score", 3),
        ("true quality", "quality", 3),
        ("KL from the reference, nats per response", "kl", 2),
        ("response length, tokens", "length", 1),
        ("ended by themselves", "ended", 3),
    ):
        values = [getattr(policy, field) for policy in policies]
        if None not in values:
            rows.append([name, *(f"{value:.{digits}f}" for value in values)])
    if (rate := found.win_rate) is not None:
        low, high = rate.interval
        rows.append(["win rate of A over B", f"{rate.rate:.3f} ({low:.3f} to {high:.3f})", ""])
        rows.append(["wins, ties, losses", f"{rate.wins}, {rate.ties}, {rate.losses}", ""])
    rows.append(["prompts", str(len(found.prompts)), ""][: len(header)])
    return header, rows


def plot_comparison(found: Comparison, path: Path) -> None:
    """Histograms of scores and lengths; of two policies also A's score against B's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    policies = {"A": found.a} if found.b is None else {"A": found.a, "B": found.b}
    panels = 2 if found.b is None else 3
    figure, axes = plt.subplots(1, panels, figsize=(4.5 * panels, 3.4))
    _histogram(axes[0], policies, "scores", "reward")
    _histogram(axes[1], policies, "lengths", "response length, tokens")
    if found.b is not None:
        _scatter(axes[2], found.a.scores, found.b.scores)
    figure.tight_layout()
    with finished_file(path) as unfinished:
        figure.savefig(unfinished, dpi=120, format="png")
    plt.close(figure)


def _histogram(axis: Any, policies: dict[str, PolicyEvaluation], field: str, title: str) -> None:
    columns = {n: [v for v in getattr(p, field) if not math.isnan(v)] for n, p in policies.items()}
    every = sorted(value for column in columns.values() for value in column) or [0.0]
    low, high = every[0], every[-1]
    if low == high:
        low, high = low - 0.5, high + 0.5
    for (name, column), colour in zip(columns.items(), ("C0", "C1"), strict=False):
        axis.hist(column, bins=24, range=(low, high), alpha=0.6, label=name, color=colour)
    axis.set_title(title, fontsize=10)
    axis.set_ylabel("prompts", fontsize=8)
    axis.legend()
    axis.grid(alpha=0.3)


def _scatter(axis: Any, a: list[float], b: list[float]) -> None:
    counts = Counter((y, x) for x, y in zip(a, b, strict=True) if not math.isnan(x + y))
    places = list(counts) or [(0.0, 0.0)]
    sizes = [10.0 * counts[place] for place in places]  # the area is the number of prompts
    axis.scatter(*zip(*places, strict=True), s=sizes, alpha=0.5, color="C0")
    ends = [min(map(min, places)), max(map(max, places))]
    axis.plot(ends, ends, color="grey", linewidth=0.8)
    axis.margins(0.15)
    axis.set_title("reward, prompt by prompt: A wins above the line", fontsize=10)
    axis.set_xlabel("B", fontsize=8)
    axis.set_ylabel("A", fontsize=8)
    axis.grid(alpha=0.3)


def _markdown(found: Comparison, header: list[str], rows: list[list[str]], samples: int) -> str:
    lines = ["# Evaluation", "", f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", "![distributions](eval.png)", "", "## Samples"]
    answers = (
        [found.a.completions] if found.b is None else [found.a.completions, found.b.completions]
    )
    for i, prompt in enumerate(found.prompts[:samples]):
        lines += ["", "```", prompt]
        for letter, column in zip("AB", answers, strict=False):
            lines.append(f"  {letter}: {column[i].strip()}")
        lines.append("```")
    return "\n".join(lines) + "\n"


def _record(found: Comparison) -> dict[str, Any]:
    record = dataclasses.asdict(found)
    if found.win_rate is not None:
        interval = list(found.win_rate.interval)
        record["win_rate"] |= {"rate": found.win_rate.rate, "interval": interval}
    for name in ("a", "b"):  # a score that was skipped is null: JSON has no NaN
        if record[name] is not None:
            scores = record[name]["scores"]
            record[name]["scores"] = [None if math.isnan(score) else score for score in scores]
    return record


def _write(path: Path, text: str) -> None:
    with finished_file(path) as unfinished:
        unfinished.write_text(text)
