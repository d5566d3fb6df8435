"""ZeRO-3 to rollout: one collective a layer against DeepSpeed's ways of gathering, in one run.

    torchrun --nproc-per-node 2 benchmarks/zero_gather.py

Each contender makes the weights ready for generation and gives them back: `GatheredParameters` as
it is; DeepSpeed's `unwrap_model_for_generation`, which TRL's repeats, and which also takes the
hooks off and puts them on again; the engine's flip. The engine's copy must equal DeepSpeed's bit
for bit before anything is timed. Then all take turns; the figures are medians of the slowest rank.
The last table is the memory of the weights in a rollout with and without tensor parallelism.
"""

from __future__ import annotations

import argparse
import contextlib
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import hybrid_engine as he
from rlhf.bench.measure import Timing, append_record, interleave, machine
from rlhf.bench.ranks import joined
from rlhf.engines.deepspeed_start import load_deepspeed

SHAPES: dict[str, tuple[dict[str, int], torch.dtype]] = {
    "0.3M": ({"vocab_size": 512, "hidden_size": 64, "intermediate_size": 172,
              "num_hidden_layers": 4, "num_attention_heads": 4}, torch.float32),
    "34M": ({"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1376,
             "num_hidden_layers": 8, "num_attention_heads": 8}, torch.bfloat16),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--output", help="append one JSON record to this file")
    args = parser.parse_args()
    with joined() as rank:
        if dist.get_world_size() < 2:
            parser.error("start it on several ranks: torchrun --nproc-per-node 2 ...")
        record = {name: measure(name, args.repeats) for name in args.shapes}
        if rank == 0:
            show(record)
            if args.output:
                append_record(args.output, machine(ranks=dist.get_world_size(), zero=record))


def measure(name: str, repeats: int) -> dict[str, Any]:
    """Seconds, collectives and bytes of one shape."""
    trainer = partitioned(name)
    calls = contenders(trainer)
    check(trainer)
    timings = interleave(calls, repeats=repeats, warmup=2)
    return {
        "parameters": sum(p.ds_numel for p in trainer.module.parameters()),
        "seconds": {call: slowest(timing) for call, timing in timings.items()},
        "collectives": {call: collectives(function) for call, function in calls.items()},
        "megabytes": {f"TP={size}": megabytes(trainer, size) for size in (1, 2)},
    }


def partitioned(name: str) -> Any:
    """A DeepSpeed engine that partitions every parameter."""
    torch.manual_seed(0)
    shape, dtype = SHAPES[name]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    model = LlamaForCausalLM(LlamaConfig(**shape))
    engine, *_ = load_deepspeed().initialize(
        model=model, model_parameters=model.parameters(), config=config
    )
    return engine


def contenders(trainer: Any) -> dict[str, Callable[[], None]]:
    from deepspeed.runtime.zero import GatheredParameters, unwrap_model_for_generation

    engine = he.HybridEngine(trainer.module, he.EngineConfig(pin_parameters=True))

    def enter(context: Callable[[], contextlib.AbstractContextManager[Any]]) -> None:
        with context():
            pass

    parameters = list(trainer.module.parameters())
    return {
        "GatheredParameters": lambda: enter(lambda: GatheredParameters(parameters)),
        "unwrap_model_for_generation": lambda: enter(lambda: unwrap_model_for_generation(trainer)),
        "hybrid_engine": lambda: enter(engine.rollout),
    }


def check(trainer: Any) -> None:
    """Refuse to time a copy that is not what DeepSpeed gathers."""
    from deepspeed.runtime.zero import GatheredParameters

    engine = he.HybridEngine(trainer.module, he.EngineConfig(pin_parameters=True))
    with GatheredParameters(list(trainer.module.parameters())):
        gathered = {name: p.data.clone() for name, p in trainer.module.named_parameters()}
    with engine.rollout():
        copy = engine.rollout_parameters()
        for name, parameter in gathered.items():
            if not torch.equal(copy[name], parameter):
                raise SystemExit(f"{name} of the rollout is not what DeepSpeed gathers")


def collectives(call: Callable[[], None]) -> int:
    """How many a call makes, by the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    counts = Counter(event.name for event in profile.events() if event.name.startswith("c10d::"))
    return sum(counts.values())


def megabytes(trainer: Any, size: int) -> float:
    """Of this rank's weights during a rollout."""
    config = he.EngineConfig(pin_parameters=True, inference_tp_size=size)
    engine = he.HybridEngine(trainer.module, config)
    with engine.rollout():
        storages = {
            p.untyped_storage().data_ptr(): p.untyped_storage().nbytes()
            for p in engine.rollout_parameters().values()
        }
    return sum(storages.values()) / 1e6


def slowest(timing: Timing) -> float:
    """The median of the rank on which it is the longest."""
    seconds = torch.tensor(timing.median, dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return float(seconds)


def show(record: dict[str, Any]) -> None:
    table = Table("parameters", "way", "ms", "against the engine", "collectives")
    memory = Table("parameters", "TP=1 MB", "TP=2 MB", "share")
    for row in record.values():
        ours = row["seconds"]["hybrid_engine"]
        size = f"{row['parameters'] / 1e6:.1f}M"
        for way, seconds in row["seconds"].items():
            table.add_row(
                size, way, f"{seconds * 1e3:.1f}", f"{seconds / ours:.2f}",
                str(row["collectives"][way]),
            )  # fmt: skip
        one, two = row["megabytes"].values()
        memory.add_row(size, f"{one:.2f}", f"{two:.2f}", f"{two / one:.0%}")
    console = Console()
    console.print(machine(ranks=dist.get_world_size()))
    console.print(table, memory)


if __name__ == "__main__":
    main()
