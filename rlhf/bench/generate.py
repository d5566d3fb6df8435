"""`rlhf bench generate`: rollouts of one model by every peer, in turn, on the same prompts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from rlhf import distributed
from rlhf.bench.check import check_tokens, logprob_gap
from rlhf.bench.measure import Timing, interleave, peers_clock
from rlhf.bench.peers import Answer, Generator, Request, find_peer, reason_of
from rlhf.bench.subject import Subject, Workload

Row = dict[str, Any]


class Timed:
    """A generator that keeps what it answered and the most memory that it took."""

    def __init__(self, generate: Generator, request: Request) -> None:
        self._generate = generate
        self._request = request
        self.tokens: list[int] = []  # of each call
        self.steps: list[int] = []  # decode steps: the longest response
        self.peak_bytes = 0
        self.answer: Answer | None = None

    def __call__(self) -> None:
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self.answer = answer = self._generate(self._request)
        lengths = [len(tokens) for tokens in answer.tokens]
        self.tokens.append(int(distributed.total(sum(lengths))[0]))
        self.steps.append(max(lengths))
        if on_gpu:
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated())
        distributed.barrier()  # a rollout is over when all ranks have theirs


@contextmanager
def opened(
    names: Sequence[str], subject: Subject, notes: dict[str, str]
) -> Iterator[dict[str, Generator]]:
    """The peers that can run here; `notes` gets the reasons of the others."""
    for name in names:
        find_peer(name)  # an unknown name is an error before anything is built
    with ExitStack() as stack:
        found: dict[str, Generator] = {}
        for name in names:
            peer = find_peer(name)
            if (reason := peer.why_not(subject)) is not None:
                notes[name] = reason
                continue
            try:
                found[name] = stack.enter_context(peer.generator(subject))
            except Exception as error:  # a foreign library's: the others are measured all the same
                notes[name] = f"did not start: {reason_of(error)}"
        yield found


def measure_generation(
    subject: Subject, workload: Workload, peers: Sequence[str], *,
    repeats: int, read_bandwidth: float, notes: dict[str, str],
    report: Callable[[str], None] = lambda _: None,
) -> list[Row]:  # fmt: skip
    """A row for each peer that gives right tokens; `notes` says why the others have none."""
    prompts = share(workload.prompts(subject.shape.vocab))
    request = Request(
        prompts, workload.new_tokens, 1.0, workload.stop_token_ids(subject.shape.vocab)
    )
    with opened(peers, subject, notes) as generators:
        timed: dict[str, Timed] = {}
        for name, generate in generators.items():
            report(f"{name}: checking its greedy tokens, warming up")
            try:
                check_tokens(name, generate, subject, request)
                call = Timed(generate, request)
                call()  # where the memory does not suffice, this one fails and no other
            except Exception as error:
                notes[name] = reason_of(error)
                continue
            timed[name] = call
        report(f"timing {', '.join(timed)}: {repeats} repeats in turn")
        timings = interleave(timed, repeats=repeats, warmup=0, clock=peers_clock)
        return [
            _row(subject, workload, request, name, timings[name], timed[name], read_bandwidth)
            for name in timings
        ]


def share(prompts: list[list[int]]) -> list[list[int]]:
    """This rank's prompts; all of them without ranks."""
    return list(distributed.share(prompts))


def _row(
    subject: Subject, workload: Workload, request: Request, name: str, timing: Timing,
    timed: Timed, read_bandwidth: float,
) -> Row:  # fmt: skip
    kept = slice(-len(timing.seconds), None)
    rates = [n / s for n, s in zip(timed.tokens[kept], timing.seconds, strict=True)]
    steps = statistics.median(timed.steps[kept])
    assert timed.answer is not None
    ideal = _ideal_bytes(subject, request, timed.answer)
    achieved = ideal / timing.median
    gap = logprob_gap(subject, request, timed.answer)
    return {
        "model": subject.name, "dtype": str(subject.dtype).removeprefix("torch."),
        "batch": workload.batch, "prompt": workload.prompt_tokens,
        "new_tokens": workload.new_tokens,
        "lengths": "natural" if workload.natural else "fixed", "peer": name,
        "seconds": timing.median, "spread_seconds": timing.spread,
        "tokens_per_s": statistics.median(rates), "ms_per_step": 1e3 * timing.median / steps,
        "GBps": achieved / 1e9, "percent_of_peak": 100 * achieved / read_bandwidth,
        "peak_GB": timed.peak_bytes / 1e9 or None,
        "logprob_gap_mean": gap and gap[0], "logprob_gap_max": gap and gap[1],
    }  # fmt: skip


def _ideal_bytes(subject: Subject, request: Request, answer: Answer) -> float:
    """What a rollout must read: the weights once a step, each cached token once a step."""
    lengths = [len(tokens) for tokens in answer.tokens]
    total = float(max(lengths) * subject.weight_bytes)
    for prompt, length in zip(request.prompts, lengths, strict=True):
        total += subject.kv_bytes * (length * len(prompt) + length * (length - 1) / 2)
    return total


def add_ratios(rows: list[Row], baseline: str, *, rate: str) -> None:
    """To each row its `rate` over the baseline's at the same case, where that was measured."""
    keys = ("model", "dtype", "batch", "prompt", "new_tokens", "lengths")
    rates = {tuple(row[key] for key in keys): row[rate] for row in rows if row["peer"] == baseline}
    for row in rows:
        of = rates.get(tuple(row[key] for key in keys))
        row["ratio"] = row[rate] / of if of else None
