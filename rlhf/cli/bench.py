"""`rlhf bench`: rollouts, whole iterations, ops and memory, beside those of others."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import ArgumentParser, Namespace

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from rich.console import Console

    from rlhf.bench.subject import Subject

WIDTH = 120  # of tables that go to a file

GENERATION_COLUMNS = (
    ("model", "model", ""), ("lengths", "lengths", ""), ("batch", "batch", "d"),
    ("peer", "peer", ""), ("tok/s", "tokens_per_s", ".0f"), ("ms/step", "ms_per_step", ".2f"),
    ("+-", "spread_ms", ".2f"), ("GB/s", "GBps", ".1f"), ("% peak", "percent_of_peak", ".0f"),
    ("GB", "peak_GB", ".1f"), ("gap", "logprob_gap_max", ".0e"), ("ratio", "ratio", ".2f"),
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
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    if options.what == "ops":
        from rlhf.bench.ops import run_ops

        run_ops(options.filter, options.output)
        return
    from rlhf.bench.ranks import joined

    with joined() as rank:
        quiet = Console(quiet=True) if rank else console
        {"generate": _generate, "step": _step, "memory": _memory}[options.what](options, quiet)


def _generate(options: Namespace, console: Console) -> None:
    from rlhf.bench.generate import add_ratios, measure_generation
    from rlhf.bench.show import plot_generation, show_notes, show_table
    from rlhf.bench.subject import Workload

    peers, notes, rows = _peers(options), dict[str, str](), []
    header = _header(options, console)
    for subject in _subjects(options):
        for batch in _numbers(options.batch):
            for natural in _natural(options):
                workload = Workload(batch, options.prompt, options.new_tokens, natural)
                rows += measure_generation(
                    subject, workload, peers, repeats=options.repeats,
                    read_bandwidth=header["read_GBps"] * 1e9, notes=notes,
                    report=lambda line: console.print(f"[dim]{line}[/dim]"),
                )  # fmt: skip
    add_ratios(rows, "hf" if "hf" in peers else peers[0])
    for row in rows:
        row["spread_ms"] = row["ms_per_step"] * row["spread_seconds"] / row["seconds"]
    title = f"rollout, {options.prompt} + {options.new_tokens} tokens, sampled; ratio to hf"
    show_table(console, title, rows, GENERATION_COLUMNS)
    show_notes(console, notes)
    _write(options, "generate", header, rows, notes, plot_generation, console)


STEP_COLUMNS = (
    ("model", "model", ""), ("batch", "batch", "d"), ("peer", "peer", ""),
    ("s", "seconds", ".3f"), ("+-", "spread_seconds", ".3f"), ("seq/s", "sequences_per_s", ".2f"),
    ("rollout%", "share_rollout", ".0f"), ("score%", "share_score", ".0f"),
    ("actor%", "share_update_actor", ".0f"), ("critic%", "share_update_critic", ".0f"),
    ("GB", "peak_GB", ".1f"), ("gap", "logprob_gap_max", ".0e"), ("ratio", "ratio", ".2f"),
)  # fmt: skip


def _step(options: Namespace, console: Console) -> None:
    from rlhf.bench.show import plot_phases, show_notes, show_table
    from rlhf.bench.step import measure_steps
    from rlhf.bench.subject import Workload

    peers, notes, rows = _peers(options), dict[str, str](), []
    header = _header(options, console)
    for subject in _subjects(options):
        for batch in _numbers(options.batch):
            for natural in _natural(options):
                workload = Workload(batch, options.prompt, options.new_tokens, natural)
                found = measure_steps(
                    subject, options.critic, workload, peers, repeats=options.repeats,
                    notes=notes, lora=options.lora,
                    report=lambda line: console.print(f"[dim]{line}[/dim]"),
                )  # fmt: skip
                of = next((row["seconds"] for row in found if row["peer"] == "hf"), None)
                for row in found:
                    row["ratio"] = of and of / row["seconds"]
                rows += found
    title = f"PPO iteration, {options.prompt} + {options.new_tokens} tokens; ratio to hf"
    show_table(console, title, rows, STEP_COLUMNS)
    show_notes(console, notes)
    _write(options, "step", header, rows, notes, plot_phases, console)


MEMORY_COLUMNS = (
    ("model", "model", ""), ("batch", "batch", "d"), ("peer", "peer", ""),
    ("model GB", "model_GB", ".3f"), ("rollout +GB", "added_GB", ".3f"),
    ("peak GB", "peak_GB", ".3f"), ("of it KV", "cache_GB", ".3f"),
)  # fmt: skip


def _memory(options: Namespace, console: Console) -> None:
    from rlhf.bench.memory import measure_memory
    from rlhf.bench.show import plot_memory, show_notes, show_table
    from rlhf.bench.subject import Workload

    peers, notes, rows = _peers(options), dict[str, str](), []
    header = _header(options, console)
    for model in options.model.split(","):
        for batch in _numbers(options.batch):
            workload = Workload(batch, options.prompt, options.new_tokens)
            rows += measure_memory(
                model, workload, peers, dtype=options.dtype, device=options.device, notes=notes
            )
    title = f"memory of a rollout, {options.prompt} + {options.new_tokens} tokens"
    show_table(console, title, rows, MEMORY_COLUMNS)
    show_notes(console, notes)
    _write(options, "memory", header, rows, notes, plot_memory, console)


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


def _natural(options: Namespace) -> list[bool]:
    return {"fixed": [False], "natural": [True], "both": [False, True]}[options.lengths]


def _subjects(options: Namespace) -> Iterator[Subject]:
    """One after the other: two large models need not fit together."""
    from rlhf.bench.subject import load_subject

    for name in options.model.split(","):
        yield load_subject(name, dtype=_dtype(options), device=options.device)


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


def _write(
    options: Namespace, name: str, header: dict[str, Any], rows: list[dict[str, Any]],
    notes: dict[str, str], plot: Any, console: Console,
) -> None:  # fmt: skip
    from rlhf import distributed
    from rlhf.bench.show import write

    if not distributed.is_first():
        return
    command = {k: v for k, v in vars(options).items() if v is not None and k != "debug"}
    record = {"bench": name, "machine": header, "command": command, "rows": rows, "notes": notes}
    if not rows:
        raise ValueError(
            f"nothing was measured: {'; '.join(f'{k}: {v}' for k, v in notes.items())}"
        )
    write(options.output, name, record, plot, console)
