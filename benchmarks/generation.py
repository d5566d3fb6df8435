"""Rollout against HF `generate` and CTranslate2: same weights, prompts and sampling, one run.

    python benchmarks/generation.py                                  # the table of README.md
    python benchmarks/generation.py --models 15M:float32 --batches 8 # some of it

Greedy tokens must agree with HF's before anything is timed. Each repeat times every contender in
turn; the figures are medians of whole calls, prompt included, divided by the tokens asked. The
tables are Markdown; the last line is one JSON record.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import generation_contenders as contenders
import generation_rollouts as rollouts
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import hybrid_engine as he
from hybrid_engine import ops
from hybrid_engine.generation.loop import MOST_STEPS

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"vocab_size": 850, "hidden_size": 192, "intermediate_size": 512,
             "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2},
    "15M": {"vocab_size": 32000, "hidden_size": 288, "intermediate_size": 768,
            "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 6},
    "110M": {"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048,
             "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12},
}  # fmt: skip
MODELS = ["15M:float32", "110M:bfloat16", "110M:float32"]
PROMPT_TOKENS = 16
Row = dict[str, Any]


def build(shape: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=512, **special)
    return LlamaForCausalLM(config).to(dtype).eval()


class Contenders:
    """All that can run here; `notes` says why the others cannot."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.notes: dict[str, str] = {}
        self._ctranslate2: contenders.CTranslate2 | None = None
        try:
            self._ctranslate2 = contenders.CTranslate2(model)
        except ImportError:
            self.notes["ctranslate2"] = "not installed: pip install ctranslate2"

    def calls(self, sampling: str, new_tokens: int) -> dict[str, contenders.Call]:
        model = self._model
        found = {
            "ours": contenders.ours(model, sampling, new_tokens),
            "hf": contenders.hugging_face(model, sampling, new_tokens),
            "hf_static": contenders.hugging_face(
                model, sampling, new_tokens, cache_implementation="static"
            ),
        }
        if self._ctranslate2:
            found["ctranslate2"] = self._ctranslate2.call(sampling, new_tokens)
        return found


def check_tokens(calls: dict[str, contenders.Call], prompts: list[list[int]]) -> None:
    """Greedy calls of a few fp32 tokens say the same."""
    tokens = {name: call(prompts) for name, call in calls.items()}
    for name, found in tokens.items():
        if not torch.equal(found, tokens["hf"]):
            raise SystemExit(f"greedy tokens of {name} differ from HF's; not timing what is wrong")


def measure(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, alternating, after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def decode_rows(name: str, arguments: argparse.Namespace, read_rate: float) -> list[Row]:
    """One row for each batch size and way of sampling."""
    shape, dtype = name.split(":")
    model = build(shape, getattr(torch, dtype))
    found = []
    everyone = Contenders(model)
    for reason in everyone.notes.values():
        print(f"CTranslate2 is {reason}")
    floor = step_bytes(model) / read_rate
    for batch in arguments.batches:
        prompts = torch.randint(3, 800, (batch, PROMPT_TOKENS)).tolist()
        if dtype == "float32":
            check_tokens(everyone.calls("greedy", 4), prompts)
        for sampling in contenders.SAMPLING:
            calls = everyone.calls(sampling, arguments.new_tokens)
            seconds = measure(
                {who: functools.partial(call, prompts) for who, call in calls.items()},
                arguments.repeats,
            )
            step = {
                who: statistics.median(times) / arguments.new_tokens * 1e3
                for who, times in seconds.items()
            }
            found.append({
                "model": name, "batch": batch, "sampling": sampling, "ms_per_step": step,
                "spread": {who: max(times) / min(times) for who, times in seconds.items()},
                "floor_ms": floor * 1e3,
                **parts(model, prompts, sampling, arguments.new_tokens),
            })  # fmt: skip
            print(json.dumps(found[-1]), flush=True)
    return found


def parts(model: Any, prompts: list[list[int]], sampling: str, new_tokens: int) -> Row:
    """Milliseconds of a decode step, without the prefill, and of its parts."""
    engine = he.HybridEngine(model)
    params = he.SamplingParams(
        max_new_tokens=new_tokens, stop_token_ids=(), **contenders.SAMPLING[sampling]
    )
    with engine.rollout():
        loop = engine.start(prompts, params)
        loop.step()
        if loop.program is None:
            return {"why_step_by_step": loop.why_step_by_step}
        before, start = loop.program.seconds, time.perf_counter()
        while not loop.done:
            loop.step(MOST_STEPS)
        whole = time.perf_counter() - start
        steps = new_tokens - 2  # the prefill gave one token, the first step another
        spent = {part: loop.program.seconds[part] - before[part] for part in before}
    spent["host"] = whole - sum(spent.values())
    return {
        "decode_ms": whole / steps * 1e3,
        "parts_ms": {part: seconds / steps * 1e3 for part, seconds in spent.items()},
    }


def step_bytes(model: Any) -> int:
    """Weights that one step reads: all, but of an embedding of its own some rows only."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if embedding is not head:
        size -= embedding.numel() * embedding.element_size()
    return size


def measured_read_rate() -> float:
    """Bytes a second at which torch reads memory beyond the caches; the best of some tries."""
    buffer = torch.ones(2**27)  # 512 MB
    times = []
    for _ in range(7):
        start = time.perf_counter()
        buffer.sum()
        times.append(time.perf_counter() - start)
    return buffer.numel() * 4 / min(times)


def rollout_row(name: str, repeats: int) -> Row:
    """Ragged rollouts and shared prompts of one model."""
    shape, dtype = name.split(":")
    model = build(shape, getattr(torch, dtype))
    calls, about = rollouts.ragged(model)
    seconds = {who: statistics.median(t) for who, t in measure(calls, repeats).items()}
    return {
        "model": name, "ragged_seconds": seconds, "ragged_lengths": about,
        "ragged_ratio": seconds["static"] / seconds["continuous"],
        "prefix": rollouts.prefix_sharing(model),
    }  # fmt: skip


def machine(read_rate: float) -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if "model name" in line]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "cpu": names[0] if names else "", "threads": torch.get_num_threads(),
        "read_gb_s": round(read_rate / 1e9, 1), "load": os.getloadavg()[0],
        "kernels": ops.NATIVE.isa or "reference", "torch": torch.__version__,
        "transformers": transformers.__version__, "commit": commit,
    }  # fmt: skip


def show(found: list[Row], wholes: list[Row], header: dict[str, Any]) -> None:
    """Tables in Markdown."""
    print("\n" + ", ".join(f"{name} {value}" for name, value in header.items()) + "\n")
    columns = ["model", "B", "sampling", "ours ms", "HF ms", "x HF", "x HF static",
               "x CTranslate2", "decode ms", "matrices", "attention", "sampling", "rest", "host",
               "% of floor", "spread"]  # fmt: skip
    print("| " + " | ".join(columns) + " |")
    print("|---" * len(columns) + "|")
    for row in found:
        step = row["ms_per_step"]
        cells = [row["model"], row["batch"], row["sampling"], f"{step['ours']:.2f}",
                 f"{step['hf']:.2f}"]  # fmt: skip
        for who in ("hf", "hf_static", "ctranslate2"):
            cells.append(f"{step[who] / step['ours']:.1f}" if who in step else "-")
        if "parts_ms" in row:
            spent = row["parts_ms"]
            cells += [f"{row['decode_ms']:.2f}"]
            cells += [f"{spent[p]:.2f}" for p in
                      ("matrices", "attention", "sampling", "rest", "host")]  # fmt: skip
            cells += [f"{100 * row['floor_ms'] / row['decode_ms']:.0f}"]
        else:
            cells += ["-"] * 7
        cells.append(f"{row['spread']['ours']:.2f}")
        print("| " + " | ".join(map(str, cells)) + " |")
    for row in wholes:
        prefix, seconds = row["prefix"], row["ragged_seconds"]
        print(
            f"\n{row['model']}: ragged rollout {seconds['continuous']:.2f} s, static batches of "
            f"{rollouts.SLOTS} {seconds['static']:.2f} s: {row['ragged_ratio']:.2f}x. Prefill of 8 "
            f"samples of 256 tokens: {prefix['shared']['tokens']} tokens, "
            f"{prefix['shared']['ms']:.1f} ms; of 8 prompts {prefix['different']['tokens']} "
            f"tokens, {prefix['different']['ms']:.1f} ms."
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS, help="SHAPE:DTYPE, as 15M:float32")
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 8, 32])
    parser.add_argument("--rollouts", nargs="*", default=["15M:float32"])
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="append the JSON record to this file")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    read_rate = measured_read_rate()
    header = machine(read_rate)
    found = [row for name in arguments.models for row in decode_rows(name, arguments, read_rate)]
    wholes = [rollout_row(name, arguments.repeats) for name in arguments.rollouts]
    show(found, wholes, header)
    record = json.dumps({**header, "rows": found, "rollouts": wholes})
    print("\n" + record)
    if arguments.output:
        with arguments.output.open("a") as file:
            file.write(record + "\n")


if __name__ == "__main__":
    main()
