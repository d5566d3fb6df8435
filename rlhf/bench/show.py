"""Tables, plots and the record of a benchmark."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from rlhf.bench.measure import append_record, geometric_mean

Row = dict[str, Any]
Column = tuple[str, str, str]  # heading, key, format


def show_table(
    console: Console, title: str, rows: Sequence[Row], columns: Sequence[Column]
) -> None:
    """The columns for which some row has a value."""
    used = [c for c in columns if any(row.get(c[1]) is not None for row in rows)]
    table = Table(title=title, box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for heading, _, form in used:
        table.add_column(heading, justify="right" if form else "left", no_wrap=True)
    for row in rows:
        values = [(row.get(key), form) for _, key, form in used]
        table.add_row(*("" if value is None else f"{value:{form}}" for value, form in values))
    console.print(table)


def show_header(console: Console, header: Row) -> None:
    versions = " ".join(f"{name} {version}" for name, version in header["versions"].items())
    console.print(
        f"{header['gpu'] or header['processor']}, {header['threads']} threads, kernels "
        f"{header['kernels']}, {versions}, Python {header['python']}, commit {header['commit']}, "
        f"load {header['load']}, reads {header['read_GBps']:.1f} GB/s, clock {header['clock']}",
        soft_wrap=True,
    )


def show_peers(console: Console, about: dict[str, str]) -> None:
    for name, what in about.items():
        console.print(f"{name}: {what}", soft_wrap=True)


def show_notes(console: Console, notes: dict[str, str]) -> None:
    for name, reason in notes.items():
        console.print(f"not measured: {name}: {reason}", soft_wrap=True)


def write(folder: str | None, name: str, record: Row, plot: Any, console: Console) -> None:
    """The record at the end of FOLDER/NAME.jsonl and its plot as FOLDER/NAME.png, or on stdout."""
    if folder is None:
        print(json.dumps(record))
        return
    path = Path(folder)
    append_record(path / f"{name}.jsonl", record)
    plot(record, path / f"{name}.png")
    console.print(f"written: {path / name}.jsonl, {path / name}.png", soft_wrap=True)


def plot_generation(record: Row, path: Path) -> None:
    """ms a step over the batch, a panel for each model and kind of lengths."""
    _plot_lines(record, path, "ms_per_step", "ms a step")


def plot_memory(record: Row, path: Path) -> None:
    _plot_lines(record, path, "peak_GB", "GB at most")


def _plot_lines(record: Row, path: Path, key: str, label: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = record["rows"]
    panels = sorted({(row["model"], row.get("lengths", "")) for row in rows})
    width = max(1, len(panels))
    figure, axes = plt.subplots(
        1, width, figsize=(1.5 + 4.5 * width, 4), squeeze=False, layout="constrained"
    )
    peers = list(dict.fromkeys(row["peer"] for row in rows))
    for axis, panel in zip(axes[0], panels, strict=False):
        for number, peer in enumerate(peers):
            points = sorted(
                (row["batch"], row[key])
                for row in rows
                if row["peer"] == peer and (row["model"], row.get("lengths", "")) == panel
            )
            if points:
                axis.plot(*zip(*points, strict=True), "o-", color=f"C{number}", label=peer)
        batches = sorted({row["batch"] for row in rows})
        axis.set_xscale("log", base=2)
        axis.set_xticks(batches, [str(batch) for batch in batches])
        axis.set(title=" ".join(filter(None, panel)), xlabel="batch", ylabel=label, ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend()
    machine = record["machine"]
    figure.suptitle(f"{machine['gpu'] or machine['processor']}, commit {machine['commit']}")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_phases(record: Row, path: Path) -> None:
    """Stacked seconds of the phases of an iteration, a bar for each peer and case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = record["rows"]
    figure, axis = plt.subplots(figsize=(3 + 1.3 * len(rows), 4.5), layout="constrained")
    names = bar_names(rows)
    below = [0.0] * len(rows)
    for phase in rows[0]["phases"]:
        seconds = [row["phases"][phase] for row in rows]
        axis.bar(names, seconds, bottom=below, label=phase.replace("_", " "))
        below = [a + b for a, b in zip(below, seconds, strict=True)]
    machine = record["machine"]
    axis.set(
        ylabel="seconds of an iteration",
        title=f"{machine['gpu'] or machine['processor']}, commit {machine['commit']}",
    )
    axis.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def bar_names(rows: Sequence[Row]) -> list[str]:
    """A name for each case: bars of one name would lie on one another."""
    return [f"{r['peer']}\n{r['model']}, batch {r['batch']}\n{r['lengths']}" for r in rows]


def plot_ops(record: Row, path: Path) -> None:
    """How many times as fast as torch each case is, a row for each op."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ratios: dict[str, list[float]] = {}
    for case in record["cases"]:
        if "ratio" in case:
            ratios.setdefault(case["name"].split("-")[0], []).append(case["ratio"])
    figure, axis = plt.subplots(figsize=(7, 1.2 + 0.3 * len(ratios)), layout="constrained")
    for place, found in enumerate(reversed(ratios.values())):
        axis.plot(found, [place] * len(found), "|", color="C0", markersize=10)
        axis.plot(geometric_mean(found), place, "o", color="C1")
    axis.set_yticks(range(len(ratios)), list(reversed(ratios)))
    axis.set_ylim(-0.5, len(ratios) - 0.5)
    axis.set_xscale("log")
    axis.axvline(1, color="0.5", linewidth=1)
    axis.set(
        xlabel="time of torch / time of the op: each case, and their geometric mean",
        title=f"{record['gpu'] or record['processor']}, commit {record['commit']}",
    )
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)
