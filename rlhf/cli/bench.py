"""`rlhf bench`: rollouts, whole iterations, ops and memory, beside those of others."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, Namespace

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch
    from rich.console import Console

    from rlhf.bench.subject import Subject, Workload

WIDTH = 120  # of tables that go to a file

CASE_COLUMNS = (
    ("model", "model", ""), ("lengths", "lengths", ""), ("batch", "batch", "d"),
    ("peer", "peer", ""),
)  # fmt: skip
GENERATION_COLUMNS = (
    *CASE_COLUMNS,
    ("tok/s", "tokens_per_s", ".0f"), ("ms/step", "ms_per_step", ".2f"),
    ("+-", "spread_ms", ".2f"), ("GB/s", "GBps", ".1f"), ("% peak", "percent_of_peak", ".0f"),
    ("GB", "peak_GB", ".1f"), ("gap", "logprob_gap_max", ".0e"), ("ratio", "ratio", ".2f"),
)  # fmt: skip
STEP_COLUMNS = (
    *CASE_COLUMNS,
    ("s", "seconds", ".3f"), ("+-", "spread_seconds", ".3f"), ("seq/s", "sequences_per_s", ".2f"),
    ("rollout%", "share_rollout", ".0f"), ("score%", "share_score", ".0f"),
    ("actor%", "share_update_actor", ".0f"), ("critic%", "share_update_critic", ".0f"),
    ("GB", "peak_GB", ".1f"), ("gap", "logprob_gap_max", ".0e"), ("ratio", "ratio", ".2f"),
)  # fmt: skip
MEMORY_COLUMNS = (
    *CASE_COLUMNS,
    ("model GB", "model_GB", ".3f"), ("rollout +GB", "added_GB", ".3f"),
    ("peak GB", "peak_GB", ".3f"), ("of it KV", "cache_GB", ".3f"),
)  # fmt: skip


def bench_parser() -> ArgumentParser:
    parser = ArgumentParser(
        description="Measure rollouts, iterations, ops or memory, with peers in turn.",
        usage="rlhf bench {generate,step,ops,memory} [--model M] [--peers A,B] [--FIELD VALUE ...]",
    )
    add = parser.add_argument
    add("what", type=Literal["generate", "step", "ops", "memory"], help="What to measure.")
    add("--model", type=str, default="tiny", help="Names, folders or hub names, by commas.")
    add("--critic", type=str | None, help="step: shape of critic and reward; default: the model's.")
    add("--peers", type=str, default="hf,ours", help="By commas; `all` for every one.")
    add("--batch", type=str, default="1,8", help="Sequences, by commas.")
    add("--prompt", type=int, default=64, help="Tokens of a prompt.")
    add("--new_tokens", type=int, default=64, help="Tokens of a response, at most.")
    add("--lengths", type=Literal["fixed", "natural", "both"], default="fixed", help="Natural: "
        "ragged prompts, responses that end by themselves.")  # fmt: skip
    add("--repeats", type=int, default=5, help="Timed rounds, in turn, after one of warm-up.")
    add("--dtype", type=str | None, help="float32, bfloat16, float16; default: of the device.")
    add("--device", type=str | None, help="cpu or cuda; default: a GPU if there is one.")
    add("--lora", type=int | None, help="step, ours: rank of adapters on the actor.")
    add("--filter", type=str | None, help="ops: only cases whose name has these words.")
    add("--output", type=str | None, help="Folder for the record and plots; default: stdout.")
    add("--debug", action="store_true", help="Show a traceback on errors.")
    return parser


def bench(options: Namespace) -> None:
    """Measure, print tables, write the record."""
    if options.what == "ops":
        from rlhf.bench.ops import run_ops

        run_ops(options.filter, options.output)
        return
    from rich.console import Console

    from rlhf.bench.ranks import joined

    with joined() as rank:
        console = Console(width=None if sys.stdout.isatty() else WIDTH, quiet=rank > 0)
        measure = {"generate": _generate, "step": _step, "memory": _memory}[options.what]
        measure(_Run(options, console))


class _Run:
    """What the measurements share: whom and what they measure, and what they find."""

    def __init__(self, options: Namespace, console: Console) -> None:
        self.options = options
        self.peers = _peers(options)
        self.baseline = "hf" if "hf" in self.peers else self.peers[0]
        self.notes: dict[str, str] = {}  # why a peer has no row
        self.rows: list[dict[str, Any]] = []
        self._console = console
        self.header = _header(options, console)

    def cases(self) -> Iterator[tuple[Subject, Workload]]:
        """One model after the other: two large ones need not fit together."""
        from rlhf.bench.subject import load_subject

        for name in self.options.model.split(","):
            subject = load_subject(name, dtype=_dtype(self.options), device=self.options.device)
            for workload in self.workloads():
                yield subject, workload

    def workloads(self) -> Iterator[Workload]:
        from rlhf.bench.subject import Workload

        options = self.options
        both = {"fixed": [False], "natural": [True], "both": [False, True]}
        for batch in _numbers(options.batch):
            for natural in both[options.lengths]:
                yield Workload(batch, options.prompt, options.new_tokens, natural)

    def report(self, line: str) -> None:
        self._console.print(f"[dim]{line}[/dim]")

    def finish(self, what: str, columns: Any, plot: Callable[..., None]) -> None:
        """Print the table and the notes, write the record and the plot."""
        from rlhf import distributed
        from rlhf.bench.peers import find_peer
        from rlhf.bench.show import show_notes, show_peers, show_table, write

        options = self.options
        title = f"{what}, {options.prompt} + {options.new_tokens} tokens"
        if any(row.get("ratio") for row in self.rows):
            title += f"; ratio to {self.baseline}"
        about = {row["peer"]: find_peer(row["peer"]).ABOUT for row in self.rows}
        show_table(self._console, title, self.rows, columns)
        show_peers(self._console, about)
        show_notes(self._console, self.notes)
        if not self.rows:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self.notes.items())
            raise ValueError(f"nothing was measured: {reasons}")
        if distributed.is_first():
            command = {k: v for k, v in vars(options).items() if v is not None and k != "debug"}
            record = {
                "bench": options.what, "machine": self.header, "command": command,
                "peers": about, "rows": self.rows, "notes": self.notes,
            }  # fmt: skip
            write(options.output, options.what, record, plot, self._console)


def _generate(run: _Run) -> None:
    from rlhf.bench.generate import add_ratios, measure_generation
    from rlhf.bench.show import plot_generation

    for subject, workload in run.cases():
        run.rows += measure_generation(
            subject, workload, run.peers, repeats=run.options.repeats,
            read_bandwidth=run.header["read_GBps"] * 1e9, notes=run.notes, report=run.report,
        )  # fmt: skip
    add_ratios(run.rows, run.baseline, rate="tokens_per_s")
    for row in run.rows:
        row["spread_ms"] = row["ms_per_step"] * row["spread_seconds"] / row["seconds"]
    run.finish("sampled rollout", GENERATION_COLUMNS, plot_generation)


def _step(run: _Run) -> None:
    from rlhf.bench.generate import add_ratios
    from rlhf.bench.show import plot_phases
    from rlhf.bench.step import measure_steps

    for subject, workload in run.cases():
        run.rows += measure_steps(
            subject, run.options.critic, workload, run.peers, repeats=run.options.repeats,
            notes=run.notes, lora=run.options.lora, report=run.report,
        )  # fmt: skip
    add_ratios(run.rows, run.baseline, rate="sequences_per_s")
    run.finish("PPO iteration", STEP_COLUMNS, plot_phases)


def _memory(run: _Run) -> None:
    from rlhf.bench.memory import measure_memory
    from rlhf.bench.show import plot_memory

    for model in run.options.model.split(","):
        for workload in run.workloads():
            run.rows += measure_memory(
                model, workload, run.peers, dtype=run.options.dtype, device=run.options.device,
                notes=run.notes,
            )  # fmt: skip
    run.finish("memory of a rollout", MEMORY_COLUMNS, plot_memory)


def _peers(options: Namespace) -> list[str]:
    from rlhf.bench.peers import PEERS, find_peer

    names = list(PEERS) if options.peers == "all" else options.peers.split(",")
    for name in names:
        find_peer(name)
    return names


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"--batch wants numbers by commas, such as 1,8,32, got {text!r}") from None


def _dtype(options: Namespace) -> torch.dtype | None:
    import torch

    if options.dtype is None:
        return None
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if options.dtype not in known:
        raise ValueError(f"no dtype {options.dtype!r}: use one of {', '.join(known)}")
    return known[options.dtype]


def _header(options: Namespace, console: Console) -> dict[str, Any]:
    import torch

    from rlhf.bench.measure import machine, matmul_rate, read_bandwidth
    from rlhf.bench.show import show_header

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = _dtype(options) or (torch.bfloat16 if device.startswith("cuda") else torch.float32)
    alone = torch.get_num_threads() == 1 and device == "cpu"
    header = machine(
        device=device, clock="of the process" if alone else "wall",
        read_GBps=read_bandwidth(device) / 1e9, matmul_TFLOPs=matmul_rate(device, dtype) / 1e12,
    )  # fmt: skip
    show_header(console, header)
    return header
