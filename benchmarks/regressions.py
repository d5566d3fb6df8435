"""Rollouts and whole iterations against the plain HF loop, small enough for every change.

    make bench                       # with the ops, against benchmarks/baseline.json
    pytest benchmarks/regressions.py

Greedy tokens are compared with the HF forward before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest

from rlhf.bench.check import check_tokens
from rlhf.bench.generate import Timed
from rlhf.bench.measure import Timing, busy_clock
from rlhf.bench.models import step_models
from rlhf.bench.peers import Request, find_peer
from rlhf.bench.peers.hf import generate as hf_generate
from rlhf.bench.plain_loop import PlainLoop
from rlhf.bench.step import OurLoop, ppo_config
from rlhf.bench.subject import Subject, Workload, load_subject
from rlhf.engines import Engines

ROUNDS = 5
ROLLOUTS = [("tiny", 1), ("tiny", 8), ("15M", 1), ("15M", 8)]


def measure(
    benchmark: Any, what: str, ours: Callable[[], None], baseline: Callable[[], None], moved: float
) -> None:
    """Time both in alternating rounds; the table in conftest.py shows them as it does the ops."""
    seconds: dict[str, list[float]] = {"ours": [], "baseline": []}

    def timed(name: str, call: Callable[[], None]) -> None:
        start = busy_clock()
        call()
        seconds[name].append(busy_clock() - start)

    benchmark.pedantic(
        lambda: timed("ours", ours), setup=lambda: timed("baseline", baseline), rounds=ROUNDS,
        warmup_rounds=1,
    )  # fmt: skip
    mine, theirs = (Timing(tuple(times[-ROUNDS:])) for times in seconds.values())
    benchmark.extra_info.update(
        op=what, ours_us=1e6 * mine.median, spread_us=1e6 * mine.spread,
        baseline_us=1e6 * theirs.median, bytes=moved, cold=False,
    )  # fmt: skip


@pytest.mark.parametrize(("model", "batch"), ROLLOUTS, ids=[f"{m}-B{b}" for m, b in ROLLOUTS])
@pytest.mark.parametrize("lengths", ["fixed", "natural"])
def test_rollout(benchmark: Any, model: str, batch: int, lengths: str) -> None:
    subject = load_subject(model, device="cpu")
    workload = Workload(batch, prompt_tokens=32, new_tokens=32, natural=lengths == "natural")
    stop = workload.stop_token_ids(subject.shape.vocab)
    request = Request(workload.prompts(subject.shape.vocab), 32, 1.0, stop)
    with find_peer("ours").generator(subject) as generate:
        check_tokens("ours", generate, subject, request)
        if workload.natural:  # both generate the same number of tokens: greedy ones
            request = Request(request.prompts, 32, 0.0, stop)
        ours = Timed(generate, request)
        baseline = Timed(lambda r: hf_generate(subject.model, r), request)
        measure(benchmark, "rollout", ours, baseline, 32.0 * subject.weight_bytes)


@pytest.mark.parametrize("batch", [8], ids=["tiny-B8"])
def test_iteration(benchmark: Any, batch: int) -> None:
    subject = load_subject("tiny", device="cpu")
    workload = Workload(batch, prompt_tokens=32, new_tokens=32)
    prompts, config = workload.prompts(subject.shape.vocab), ppo_config(workload, iterations=8)
    with ExitStack() as stack:
        models = step_models(subject, None, stop=())
        ours = OurLoop(models, config, subject.shape.vocab, None)
        actor = Subject("tiny", models.actor, subject.shape)
        check_tokens("ours", ours.generate, actor, Request(prompts, 8, 0.0))
        theirs = step_models(subject, None, stop=())
        rollout = stack.enter_context(
            find_peer("hf").generator(Subject("tiny", theirs.actor, subject.shape))
        )
        plain = PlainLoop(theirs, lambda _: rollout, Engines(), config, ())
        measure(
            benchmark, "ppo iteration", lambda: ours.iterate(prompts),
            lambda: plain.iterate(prompts), 0.0,
        )  # fmt: skip
