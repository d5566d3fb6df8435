"""`rlhf bench step`: whole PPO iterations by phase, ours and as others would run them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from rlhf import distributed
from rlhf.bench.check import check_tokens
from rlhf.bench.generate import share
from rlhf.bench.measure import interleave, peers_clock
from rlhf.bench.models import StepModels, step_models
from rlhf.bench.peers import Answer, Request, find_peer, reason_of
from rlhf.bench.plain_loop import PlainLoop, Rollout
from rlhf.bench.subject import Subject, Workload
from rlhf.config import LoraConfig, OptimizerConfig, PPOConfig
from rlhf.engines import Engines, TrainingEngine

PHASES = ("rollout", "score", "update_actor", "update_critic")
PLAIN = ("hf", "hf-compile", "colossal", "hf-ddp", "deepspeed-zero")  # a rollout in PlainLoop
NO_STEP = {
    "trl": "TRL has no PPO trainer any more",
    "deepspeed-he": "its rollouts are measured by `rlhf bench generate`",
}
MICRO_BATCH = 8


class Loop(Protocol):
    """A trainer: iterations; of the last one, where its seconds went and the tokens it had."""

    phases: dict[str, float]
    tokens: int  # of prompts and responses, on this rank

    def iterate(self, prompts: list[list[int]]) -> None: ...


class OurLoop:
    """`rlhf.PPOTrainer`."""

    def __init__(self, models: StepModels, config: PPOConfig, vocab: int, lora: int | None) -> None:
        from rlhf.bench.tokenizer import word_tokenizer
        from rlhf.trainers import PPOTrainer, RLHFEngine

        actor = models.actor
        if lora:
            from rlhf.models import add_adapters

            actor = add_adapters(actor, LoraConfig(r=lora))
        tokenizer = word_tokenizer(vocab)
        self._engine = RLHFEngine(actor, models.critic, models.reward, tokenizer)
        self._trainer = PPOTrainer(self._engine, config)
        self.phases: dict[str, float] = {}
        self.tokens = 0
        self.gap: tuple[float, float] | None = None

    def generate(self, request: Request) -> Answer:
        from hybrid_engine import SamplingParams

        params = SamplingParams(
            max_new_tokens=request.new_tokens, temperature=request.temperature,
            stop_token_ids=request.stop_token_ids,
        )  # fmt: skip
        rollout = self._engine.rollout_engine.generate(request.prompts, params)
        return Answer([rollout.response(i) for i in range(len(request.prompts))])

    def iterate(self, prompts: list[list[int]]) -> None:
        experience = self._trainer.generate_experience(prompts)
        self._trainer.train_rlhf(experience)
        self.tokens = int(experience.lengths.sum()) // distributed.world_size()  # it has all ranks'
        metrics = self._trainer.metrics
        self.phases = {name: metrics[f"timing_s/{name}"] for name in PHASES}
        key = "sampling/logp_difference"
        self.gap = (metrics[f"{key}/mean"], metrics[f"{key}/max"])


@dataclass
class Timed:
    """A loop that remembers the phases of every iteration."""

    loop: Loop
    prompts: list[list[int]]
    peak_bytes: int = 0

    def __post_init__(self) -> None:
        self.phases: list[dict[str, float]] = []
        self.tokens: list[float] = []  # of all ranks

    def __call__(self) -> None:
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self.loop.iterate(self.prompts)
        self.phases.append(dict(self.loop.phases))
        self.tokens += distributed.total(self.loop.tokens)
        if on_gpu:
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated())
        distributed.barrier()


def measure_steps(
    subject: Subject, critic: str | None, workload: Workload, peers: Sequence[str], *,
    repeats: int, notes: dict[str, str], lora: int | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each peer that trains and gives right tokens; `notes` has the others' reasons."""
    stop = workload.stop_token_ids(subject.shape.vocab)
    prompts = workload.prompts(subject.shape.vocab)
    config = ppo_config(workload, iterations=repeats + 1)
    with ExitStack() as stack:
        timed = {}
        for name in peers:
            find_peer(name)
            if (reason := _why_not(name, subject)) is not None:
                notes[name] = reason
                continue
            report(f"{name}: building its models, checking its greedy tokens, warming up")
            try:
                models = step_models(subject, critic, stop=stop, copied=len(peers) > 1)
                loop = stack.enter_context(_loop(name, subject, models, config, stop, lora))
                call = Timed(loop, prompts if name == "ours" else share(prompts))
                call()  # where the memory does not suffice, this one fails and no other
            except Exception as error:
                notes[name] = reason_of(error)
                continue
            timed[name] = call
        report(f"timing {', '.join(timed)}: {repeats} repeats in turn")
        timings = interleave(timed, repeats=repeats, warmup=0, clock=peers_clock)
    rows = []
    for name, timing in timings.items():
        laps = timed[name].phases[-repeats:]
        shares = {p: statistics.median(lap[p] / sum(lap.values()) for lap in laps) for p in PHASES}
        phases = {p: timing.median * shares[p] / sum(shares.values()) for p in PHASES}
        rates = [n / t for n, t in zip(timed[name].tokens[-repeats:], timing.seconds, strict=True)]
        gap = getattr(timed[name].loop, "gap", None)
        rows.append({
            "model": subject.name, "critic": critic or subject.name, "peer": name,
            "dtype": str(subject.dtype).removeprefix("torch."), "batch": workload.batch,
            "prompt": workload.prompt_tokens, "new_tokens": workload.new_tokens,
            "micro_batch": config.micro_batch_size,
            "lengths": "natural" if workload.natural else "fixed", "lora": lora,
            "seconds": timing.median, "spread_seconds": timing.spread, "phases": phases,
            **{f"share_{p}": 100 * phases[p] / sum(phases.values()) for p in PHASES},
            "tokens_per_s": statistics.median(rates),
            "sequences_per_s": workload.batch / timing.median,
            "peak_GB": timed[name].peak_bytes / 1e9 or None,
            "logprob_gap_mean": gap and gap[0], "logprob_gap_max": gap and gap[1],
        })  # fmt: skip
    return rows


def ppo_config(workload: Workload, *, iterations: int) -> PPOConfig:
    """Learning rates so small that all repeats see the same policy, and no limit on its KL."""
    optimizer = OptimizerConfig(learning_rate=1e-7, schedule="constant")
    return PPOConfig(
        iterations=iterations, batch_size=workload.batch, max_new_tokens=workload.new_tokens,
        micro_batch_size=min(MICRO_BATCH, workload.batch), actor_optimizer=optimizer,
        critic_optimizer=optimizer,
    )  # fmt: skip


def _why_not(name: str, subject: Subject) -> str | None:
    if name in NO_STEP:
        return NO_STEP[name]
    if name != "ours" and name not in PLAIN:
        return "it generates only"
    return find_peer(name).why_not(subject)


def _given(rollout: Rollout, _: TrainingEngine) -> Rollout:
    return rollout


@contextmanager
def _loop(
    name: str, subject: Subject, models: StepModels, config: PPOConfig, stop: tuple[int, ...],
    lora: int | None,
) -> Iterator[Loop]:  # fmt: skip
    """The peer's trainer, its rollouts checked."""
    from rlhf.bench.deepspeed_start import process_group
    from rlhf.bench.peers.deepspeed_zero import sharded_rollout
    from rlhf.bench.peers.hf_ddp import DistributedEngines

    actor = Subject(subject.name, models.actor, subject.shape)
    workload = Workload(batch=2, prompt_tokens=16)
    request = Request(workload.prompts(subject.shape.vocab), 8, 0.0)
    if name == "ours":
        ours = OurLoop(models, config, subject.shape.vocab, lora)
        check_tokens(name, ours.generate, actor, request)
        yield ours
        return
    with ExitStack() as stack:
        engines: Any = Engines()
        rollout_of: Callable[[TrainingEngine], Rollout]
        if name == "deepspeed-zero":
            stack.enter_context(process_group(subject.device))
            engines, rollout_of = Engines(zero_stage=3), sharded_rollout
        else:
            generate = stack.enter_context(find_peer(name).generator(actor))
            engines = DistributedEngines() if name == "hf-ddp" else engines
            rollout_of = partial(_given, generate)
        loop = PlainLoop(models, rollout_of, engines, config, stop)
        check_tokens(name, loop.rollout, actor, request)
        yield loop
