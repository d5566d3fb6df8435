"""Rollout against HF `generate`: same random weights, same prompts, same sampling, one run.

    python benchmarks/generation.py --shapes tiny 15M --batches 1 8 32

Greedy tokens must agree before anything is timed. Each repeat times every contender in turn; the
figures are medians. `--output FILE` appends one JSON record with machine, versions and commit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import hybrid_engine as he
from hybrid_engine import ops

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"vocab_size": 850, "hidden_size": 192, "intermediate_size": 512,
             "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2},
    "15M": {"vocab_size": 32000, "hidden_size": 288, "intermediate_size": 768,
            "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 6},
    "110M": {"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048,
             "num_hidden_layers": 12, "num_attention_heads": 12, "num_key_value_heads": 12},
}  # fmt: skip
SAMPLING: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0.0}, "top_p": {"top_p": 0.9}}
PROMPT_TOKENS = 16


def build(shape: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=512, **special)
    return LlamaForCausalLM(config).to(dtype).eval()


def contenders(
    model: Any, prompts: list[list[int]], sampling: str, new_tokens: int
) -> dict[str, Callable[[], torch.Tensor]]:
    """Name -> a call that generates exactly `new_tokens` for each prompt, (B, new_tokens)."""
    engine = he.HybridEngine(model)
    params = he.SamplingParams(max_new_tokens=new_tokens, stop_token_ids=(), **SAMPLING[sampling])
    ids = torch.tensor(prompts)
    greedy = sampling == "greedy"
    options = {} if greedy else {"top_k": 0, "top_p": SAMPLING[sampling]["top_p"]}

    def hf() -> torch.Tensor:
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens,
            eos_token_id=None, do_sample=not greedy, **options,
        )  # fmt: skip
        return output[:, ids.shape[1] :]

    return {"hybrid_engine": lambda: engine.generate(prompts, params).tokens, "hf": hf}


def measure(calls: dict[str, Callable[[], torch.Tensor]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, alternating, after one warm-up round."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(repeats + 1):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def check_tokens(model: Any, prompts: list[list[int]]) -> None:
    tokens = [call() for call in contenders(model, prompts, "greedy", 4).values()]
    if model.dtype == torch.float32 and not torch.equal(*tokens):
        raise SystemExit("greedy tokens differ from HF's; not timing what is wrong")


def rows(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    dtype = getattr(torch, arguments.dtype)
    for shape in arguments.shapes:
        model = build(shape, dtype)
        floor = read_floor(model)
        for batch in arguments.batches:
            prompts = torch.randint(3, 800, (batch, PROMPT_TOKENS)).tolist()
            check_tokens(model, prompts)
            for sampling in SAMPLING:
                calls = contenders(model, prompts, sampling, arguments.new_tokens)
                seconds = measure(calls, arguments.repeats)
                step = {
                    name: statistics.median(times) / arguments.new_tokens * 1e3
                    for name, times in seconds.items()
                }
                found.append({
                    "shape": shape, "batch": batch, "sampling": sampling, "ms_per_step": step,
                    "spread": {n: max(t) / min(t) for n, t in seconds.items()},
                    "ratio": step["hf"] / step["hybrid_engine"], "floor_ms": floor * 1e3,
                })  # fmt: skip
    return found


def read_floor(model: Any) -> float:
    """Seconds to read every weight once, at the measured rate of reading memory."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    buffer = torch.ones(2**27)  # 512 MB, beyond the caches
    times = []
    for _ in range(5):
        start = time.perf_counter()
        buffer.sum()
        times.append(time.perf_counter() - start)
    return size / (buffer.numel() * 4 / statistics.median(times))


def machine() -> dict[str, Any]:
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if "model name" in line]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "cpu": names[0] if names else "", "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0], "kernels": ops.NATIVE.isa or "reference",
        "torch": torch.__version__, "transformers": transformers.__version__, "commit": commit,
    }  # fmt: skip


def show(found: list[dict[str, Any]], header: dict[str, Any]) -> None:
    table = Table(title=", ".join(f"{name} {value}" for name, value in header.items()))
    for column in ("shape", "batch", "sampling", "ms/step", "HF ms/step", "ratio", "floor ms"):
        table.add_column(column, justify="right")
    for row in found:
        step = row["ms_per_step"]
        table.add_row(
            row["shape"], str(row["batch"]), row["sampling"], f"{step['hybrid_engine']:.2f}",
            f"{step['hf']:.2f}", f"{row['ratio']:.1f}x", f"{row['floor_ms']:.2f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(f"geometric mean {statistics.geometric_mean(r['ratio'] for r in found):.2f}x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["tiny", "15M"], choices=SHAPES)
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    header = machine()
    found = rows(arguments)
    show(found, header)
    if arguments.output:
        with arguments.output.open("a") as file:
            file.write(json.dumps({**header, "dtype": arguments.dtype, "rows": found}) + "\n")


if __name__ == "__main__":
    main()
