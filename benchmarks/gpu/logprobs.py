"""Log-probs and entropy from hidden states, fused and through all the logits: time and memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.case import BF16, HIDDEN, Place
from hybrid_engine import ops

TOKENS, VOCABULARY = 4096, 128256
REPEATS = 5
WORST_DIFFERENCE = 0.05  # of log-probs, between bf16 logits rounded and not

Heads = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def materialising(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    logprobs = torch.log_softmax(F.linear(hidden, weight).float(), -1)  # (N, V)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets.unsqueeze(1)).squeeze(1), entropy


HEADS: dict[str, Heads] = {"ours": ops.linear_logprob, "plain": materialising}


@dataclass(frozen=True)
class Inputs:
    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    targets: Tensor  # (N,)

    @classmethod
    def at(cls, place: Place) -> Inputs:
        tokens, vocabulary, dim = (place.size(n) for n in (TOKENS, VOCABULARY, HIDDEN))
        return cls(
            hidden=place.randn(tokens, dim).requires_grad_(),
            weight=(place.randn(vocabulary, dim) * dim**-0.5).requires_grad_(),
            targets=torch.randint(vocabulary, (tokens,), device=place.device),
        )

    @property
    def logits_bytes(self) -> int:
        return len(self.hidden) * len(self.weight) * BF16.itemsize


@torch.no_grad()
def forward(head: Heads, inputs: Inputs) -> tuple[Tensor, ...]:
    return head(inputs.hidden, inputs.weight, inputs.targets)


def training(head: Heads, inputs: Inputs) -> tuple[Tensor, ...]:
    """The same with gradients of their sum to hidden states and weight."""
    results = head(inputs.hidden, inputs.weight, inputs.targets)
    total = torch.stack(results).sum()
    gradients = torch.autograd.grad(total, (inputs.hidden, inputs.weight))
    return *(result.detach() for result in results), *gradients


PASSES = {"forward": forward, "training": training}


def largest_difference(name: str, inputs: Inputs) -> float:
    """Of log-probs, between the two heads."""
    ours, plain = (PASSES[name](head, inputs)[0] for head in HEADS.values())
    return (ours - plain).abs().amax().item()


def measure(place: Place) -> dict[str, dict[str, Any]]:
    """For each pass: milliseconds, peak memory beside the results, and how far apart they are."""
    inputs, record = Inputs.at(place), {}
    for name, run in PASSES.items():
        difference = largest_difference(name, inputs)  # warms up, too
        found: dict[str, Any] = {"largest_difference": difference}
        if not difference <= WORST_DIFFERENCE:
            record[name] = {**found, "failed": f"log-probs differ by {difference:.3g}"}
            continue
        times: dict[str, list[float]] = {who: [] for who in HEADS}
        peaks: dict[str, int] = {}
        for _ in range(REPEATS):
            for who, head in HEADS.items():
                milliseconds, peaks[who] = _timed(lambda run=run, head=head: run(head, inputs))
                times[who].append(milliseconds)
        for who, samples in times.items():
            low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
            found |= {f"{who}_ms": median, f"{who}_spread_ms": (high - low) / 2}
            found |= {f"{who}_percent_of_logits": 100 * peaks[who] / inputs.logits_bytes}
        record[name] = {**found, "ratio": found["plain_ms"] / found["ours_ms"]}
    return record


def _timed(call: Callable[[], tuple[Tensor, ...]]) -> tuple[float, int]:
    """Milliseconds on the device, and the most bytes allocated beside what the call returns."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    results = call()
    end.record()
    end.synchronize()
    returned = sum(result.nbytes for result in results)
    return begin.elapsed_time(end), torch.cuda.max_memory_allocated() - before - returned
