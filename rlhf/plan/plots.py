"""The figure of the scaling study."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plot_study(studies: list[dict[str, Any]], path: Path) -> None:
    """Four panels: strong and weak scaling of each model, links under ZeRO-3, links under TP."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(12, 8.5), layout="constrained")
    gpu, system = studies[0]["gpu"], studies[0]["system"]
    figure.suptitle(f"PPO iterations on {gpu}, {system}: a simulation, not a measurement")
    _scaling(axes[0, 0], axes[0, 1], studies)
    largest = studies[-1]
    _links(axes[1, 0], largest["zero3"], "gpus", 100.0)
    axes[1, 0].set(
        title=f"ZeRO-3, {largest['model']}, batch {largest['strong'][0]['batch']}", xlabel="GPUs",
        ylabel="% of the iteration spent waiting for links", xscale="log",
    )  # fmt: skip
    _links(axes[1, 1], largest["tensor_parallel"], "width", 1.0)
    axes[1, 1].set(
        title=f"tensor parallelism in decode, {largest['model']}", xscale="log",
        xlabel="GPUs that share the weights", ylabel="ms of a decode step",
    )  # fmt: skip
    for axis in axes.flat:
        axis.grid(alpha=0.3)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(matplotlib.ticker.FuncFormatter(lambda x, _: f"{x:.0f}"))
        axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _scaling(strong_axis: Any, weak_axis: Any, studies: list[dict[str, Any]]) -> None:
    for number, study in enumerate(studies):
        colour = f"C{number}"
        strong, weak = study["strong"], study["weak"]
        gpus = [row["gpus"] for row in strong]
        seconds = [row["seconds"] for row in strong]
        strong_axis.plot(gpus, seconds, "o-", color=colour, label=study["model"])
        ideal = [seconds[0] * gpus[0] / count for count in gpus]
        strong_axis.plot(gpus, ideal, ":", color=colour, alpha=0.6)
        rates = [row["sequences_per_s_per_gpu"] for row in weak]
        weak_axis.plot(
            [row["gpus"] for row in weak], [100 * rate / max(rates) for rate in rates],
            "o-", color=colour, label=study["model"],
        )  # fmt: skip
    strong_axis.set(
        title=f"strong: batch {studies[0]['strong'][0]['batch']} (dotted: ideal)",
        xlabel="GPUs", ylabel="seconds an iteration", yscale="log",
    )  # fmt: skip
    weak_axis.set(
        title="weak: 16 sequences a GPU", xlabel="GPUs",
        ylabel="% of the best sequences a second and GPU", ylim=(0, None),
    )  # fmt: skip


def _links(axis: Any, data: dict[str, Any], x: str, factor: float) -> None:
    for name, values in data["links"].items():
        axis.plot(data[x], [factor * value for value in values], "o-", label=name)
    axis.set_ylim(0, None)
