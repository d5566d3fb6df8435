"""Whole iterations against the plain way and against TRL: same model, same batch, one run.

    python benchmarks/rlhf_step.py                       # 15M and 110M, with TRL
    python benchmarks/rlhf_step.py --shapes 15M --peers none --memory none

- PPO (rollout, scoring by four models, one update) against HF `generate`, padded logits,
  log_softmax and gather: `rlhf.bench` times both in turn, after comparing their greedy tokens.
- Memory: each way in a process of its own, so that the peak is its alone. Given are what an
  iteration adds to the four models and the optimizers' state, and the whole process.
- GRPO and RLOO against TRL's trainers: ours and theirs in turn, a KL from a reference in both.

Figures are medians. `--output FILE` appends one JSON record with machine, versions and commit.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

# Read when torch is imported: a waiting thread that spins makes a busy machine many times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf.bench.measure import append_record, machine, matmul_rate
from rlhf.bench.models import step_models
from rlhf.bench.plain_loop import PlainLoop
from rlhf.bench.step import OurLoop, measure_steps, ppo_config
from rlhf.bench.subject import Subject, Workload, load_subject
from rlhf.bench.tokenizer import word_tokenizer
from rlhf.config import OptimizerConfig, PPOConfig
from rlhf.engines import Engines
from rlhf.plan.shapes import ModelShape, from_config

SAMPLES = 4  # responses to each prompt of the group methods
Row = dict[str, Any]


def time_ppo(shape: str, workload: Workload, repeats: int) -> Row:
    subject = load_subject(shape, dtype=torch.float32, device="cpu")
    rate = matmul_rate("cpu", torch.float32)
    notes: dict[str, str] = {}
    rows = measure_steps(subject, None, workload, ["ours", "hf"], repeats=repeats, notes=notes)
    if notes:
        raise SystemExit(f"not timed: {notes}")
    ours, plain = rows
    floor = None if workload.natural else step_flops(subject.shape, workload) / rate
    return {
        "what": f"PPO {shape}, {ours['lengths']} lengths", "matmul_FLOPs": rate, "floor_s": floor,
        "ours_s": ours["seconds"], "theirs_s": plain["seconds"],
        "spread_s": ours["spread_seconds"], "their_spread_s": plain["spread_seconds"],
        "phases": ours["phases"], "their_phases": plain["phases"],
        "tokens_per_s": ours["tokens_per_s"], "their_tokens_per_s": plain["tokens_per_s"],
    }  # fmt: skip


def step_flops(shape: ModelShape, workload: Workload) -> float:
    """What the matrix products of our iteration take, where all lengths are fixed.

    Forward passes are 2 per weight and token, backward ones 4, and the head's logits, of response
    tokens alone, are computed once more in the backward. Attention is left out.
    """
    head = shape.vocab * shape.hidden
    body = shape.layers * shape.layer_parameters
    prompt, response = workload.batch * workload.prompt_tokens, workload.batch * workload.new_tokens
    tokens = prompt + response
    rollout = 2 * body * tokens + 2 * head * response
    score = 2 * (3 * body * tokens + head * response)  # reference, critic, reward model
    update = 6 * body * tokens + 8 * head * response + 6 * body * tokens  # actor, critic
    return rollout + score + update


# ---- memory --------------------------------------------------------------------------------------


def measure_memory(vocabulary: int, workload: Workload) -> Row:
    context = multiprocessing.get_context("spawn")
    found = {}
    for way in ("ours", "plain"):
        queue: Any = context.Queue()
        process = context.Process(target=_memory_of, args=(queue, way, vocabulary, workload))
        process.start()
        found[way] = queue.get()
        process.join()
    ours, plain = found["ours"], found["plain"]
    return {
        "what": f"PPO 15M, vocabulary {vocabulary}", "ours_added_GB": ours[0],
        "plain_added_GB": plain[0], "ours_GB": ours[1], "plain_GB": plain[1],
        "added_share": ours[0] / plain[0], "share": ours[1] / plain[1],
    }  # fmt: skip


def _memory_of(queue: Any, way: str, vocabulary: int, workload: Workload) -> None:
    subject = _with_vocabulary(vocabulary)
    prompts = workload.prompts(vocabulary)
    loop = _loop(way, subject, workload)
    loop.iterate(prompts)  # optimizer state is made
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew: proc(5)
    before = _status("VmRSS")
    loop.iterate(prompts)
    peak = _status("VmHWM")
    queue.put(((peak - before) / 1e9, peak / 1e9))


def _loop(way: str, subject: Subject, workload: Workload) -> Any:
    from rlhf.bench.peers import find_peer

    config = replace(ppo_config(workload, iterations=2), micro_batch_size=workload.batch)
    models = step_models(subject, None, stop=())
    if way == "ours":
        return OurLoop(models, config, subject.shape.vocab, None)
    actor = Subject(subject.name, models.actor, subject.shape)
    generate = find_peer("hf").generator(actor).__enter__()
    return PlainLoop(models, lambda _: generate, Engines(), config, ())


def _with_vocabulary(vocabulary: int) -> Subject:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=288, intermediate_size=768, num_hidden_layers=6,
        num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=512,
        tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    name = f"15M-{vocabulary}"
    return Subject(name, LlamaForCausalLM(config).eval(), from_config(config, name))


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(name))


# ---- TRL -----------------------------------------------------------------------------------------


def reward_lengths(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(text) % 7) for text in completions]


def our_rewards(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    return reward_lengths(completions)


def time_trl(algorithm: str, shape: str, workload: Workload, repeats: int) -> Row:
    """Seconds of an iteration of `workload.batch` responses, SAMPLES to each prompt."""
    tokenizer = word_tokenizer(load_subject(shape, device="cpu").shape.vocab)
    count = workload.batch // SAMPLES
    prompts = Workload(count, workload.prompt_tokens).prompts(len(tokenizer))
    ours = _our_group_steps(algorithm, shape, tokenizer, prompts, workload, repeats)
    theirs = _trl_steps(algorithm, shape, tokenizer, prompts, workload, repeats)
    tokens = workload.batch * (workload.prompt_tokens + workload.new_tokens)
    seconds, their_seconds = statistics.median(ours), statistics.median(theirs)
    return {
        "what": f"{algorithm.upper()} {shape}", "floor_s": None, "ours_s": seconds,
        "theirs_s": their_seconds, "spread_s": max(ours) - min(ours),
        "their_spread_s": max(theirs) - min(theirs), "tokens_per_s": tokens / seconds,
        "their_tokens_per_s": tokens / their_seconds,
    }  # fmt: skip


def _our_group_steps(
    algorithm: str, shape: str, tokenizer: Any, prompts: Any, workload: Workload, repeats: int
) -> list[float]:
    from rlhf.rewards import Reward
    from rlhf.trainers import PPOTrainer, RLHFEngine

    actor = load_subject(shape, dtype=torch.float32, device="cpu").model
    actor.generation_config.eos_token_id = None
    actor.config.eos_token_id = None
    optimizer = OptimizerConfig(learning_rate=1e-7, schedule="constant")
    config = PPOConfig(
        algorithm=algorithm, samples_per_prompt=SAMPLES, batch_size=len(prompts),  # type: ignore[arg-type]
        max_new_tokens=workload.new_tokens, micro_batch_size=workload.batch, kl_coef=0.04,
        iterations=repeats + 1, actor_optimizer=optimizer,
    )  # fmt: skip
    trainer = PPOTrainer(RLHFEngine(actor, None, Reward([our_rewards]), tokenizer), config)
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        trainer.train_rlhf(trainer.generate_experience(prompts))
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def _trl_steps(
    algorithm: str, shape: str, tokenizer: Any, prompts: Any, workload: Workload, repeats: int
) -> list[float]:
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    ends: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

    model = load_subject(shape, dtype=torch.float32, device="cpu").model
    model.generation_config.eos_token_id = None
    model.config.eos_token_id = None
    config_class, trainer_class = {
        "grpo": (trl.GRPOConfig, trl.GRPOTrainer),
        "rloo": (trl.RLOOConfig, trl.RLOOTrainer),
    }[algorithm]
    with tempfile.TemporaryDirectory() as folder:
        config = config_class(
            output_dir=folder, per_device_train_batch_size=workload.batch,
            num_generations=SAMPLES, max_completion_length=workload.new_tokens,
            max_steps=repeats + 2, beta=0.04, learning_rate=1e-7, lr_scheduler_type="constant",
            gradient_checkpointing=False, bf16=False, use_cpu=True, report_to="none",
            save_strategy="no", disable_tqdm=True, temperature=1.0, logging_steps=10**6,
            generation_kwargs={"min_new_tokens": workload.new_tokens},
            model_init_kwargs={"dtype": "float32"},
        )  # fmt: skip
        model.save_pretrained(f"{folder}/model")  # TRL loads actor and reference by name
        rows = Dataset.from_dict({"prompt": [tokenizer.decode(ids) for ids in prompts] * 64})
        trainer = trainer_class(
            model=f"{folder}/model", reward_funcs=reward_lengths, args=config, train_dataset=rows,
            processing_class=tokenizer, callbacks=[Clock()],
        )  # fmt: skip
        trainer.train()
    return [b - a for a, b in itertools.pairwise(ends)][1:]


# ---- command -------------------------------------------------------------------------------------


def show(rows: list[Row], title: str, columns: dict[str, str]) -> None:
    table = Table("what", *columns, title=title)
    for row in rows:
        table.add_row(row["what"], *(form.format(**row) for form in columns.values()))
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["15M", "110M"])
    parser.add_argument("--peers", nargs="+", default=["grpo", "rloo"])
    parser.add_argument("--memory", nargs="+", default=["32000", "152000"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt_tokens", type=int, default=32)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    workload = Workload(arguments.batch, arguments.prompt_tokens, arguments.new_tokens)
    timed = [
        time_ppo(shape, replace(workload, natural=natural), arguments.repeats)
        for shape in arguments.shapes
        for natural in (False, True)
    ]
    for algorithm in arguments.peers if arguments.peers != ["none"] else []:
        for shape in arguments.shapes:
            timed.append(time_trl(algorithm, shape, workload, arguments.repeats))
    memory = [measure_memory(int(size), workload) for size in arguments.memory if size != "none"]
    for row in timed:
        row["ratio"] = row["tokens_per_s"] / row["their_tokens_per_s"]
        row["floor"] = "" if row["floor_s"] is None else f"{row['floor_s']:.2f}"
    show(timed, "iterations: PPO against the plain way, the others against TRL", {
        "floor s": "{floor}", "s": "{ours_s:.2f} +- {spread_s:.2f}",
        "their s": "{theirs_s:.2f} +- {their_spread_s:.2f}",
        "tokens/s": "{tokens_per_s:.0f}", "their tokens/s": "{their_tokens_per_s:.0f}",
        "ratio": "{ratio:.2f}x",
    })  # fmt: skip
    show(memory, "memory of an iteration, ours of plain", {
        "added GB": "{ours_added_GB:.2f} of {plain_added_GB:.2f}", "share": "{added_share:.0%}",
        "process GB": "{ours_GB:.2f} of {plain_GB:.2f}", "its share": "{share:.0%}",
    })  # fmt: skip
    if arguments.output:
        record = {"header": machine(), "workload": vars(workload), "timed": timed, "memory": memory}
        append_record(arguments.output, record)


if __name__ == "__main__":
    main()
