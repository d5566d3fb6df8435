"""Whole rollouts of `benchmarks/generation.py`: ragged lengths, and many samples of one prompt."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

import hybrid_engine as he
from hybrid_engine.generation.loop import MOST_STEPS
from hybrid_engine.models import Decoder

SLOTS = 16
PROMPTS = 128


def log_normal_lengths(mean: float = 64.0, sigma: float = 0.8, most: int = 256) -> list[int]:
    """Lengths of PROMPTS responses, at least 2."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(PROMPTS, generator=generator)
    lengths = (normal * sigma - sigma**2 / 2).exp() * mean
    return lengths.round().clamp(2, most).int().tolist()


def ragged(model: Any) -> tuple[dict[str, Callable[[], int]], dict[str, Any]]:
    """Two ways to generate the same responses; each call returns the tokens that were wanted.

    continuous: 16 slots, a response that has its length makes room at once. static: groups of 16,
    each decoded until its longest response is done.
    """
    lengths = log_normal_lengths()
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(3, 800, (PROMPTS, 16), generator=generator).tolist()
    engine = he.HybridEngine(model, he.EngineConfig(max_running=SLOTS))

    def params(longest: int) -> he.SamplingParams:
        return he.SamplingParams(max_new_tokens=longest, stop_token_ids=(), top_p=0.9)

    def continuous() -> int:
        with engine.rollout():
            loop = engine.start(prompts, params(max(lengths)))
            unfinished = dict(enumerate(lengths))
            while not loop.done:
                loop.step(_steps_until_one_ends(loop.lengths.tolist(), unfinished))
                made = loop.lengths.tolist()
                for index in [i for i, wanted in unfinished.items() if made[i] >= wanted]:
                    loop.cancel(index)
                    del unfinished[index]
        return sum(lengths)

    def static() -> int:
        with engine.rollout():
            for first in range(0, PROMPTS, SLOTS):
                group = slice(first, first + SLOTS)
                engine.generate(prompts[group], params(max(lengths[group])))
        return sum(lengths)

    about = {"mean": sum(lengths) / PROMPTS, "most": max(lengths)}
    return {"continuous": continuous, "static": static}, about


def _steps_until_one_ends(made: list[int], unfinished: dict[int, int]) -> int:
    running = [wanted - made[i] for i, wanted in unfinished.items() if made[i]]
    waiting = [wanted - 1 for i, wanted in unfinished.items() if not made[i]]
    return max(1, min(running + waiting[: SLOTS - len(running)] + [MOST_STEPS]))


def prefix_sharing(model: Any, *, samples: int = 8, tokens: int = 256) -> dict[str, Any]:
    """Prefill of n samples of one prompt, against as many different prompts."""
    generator = torch.Generator().manual_seed(2)
    prompts = torch.randint(3, 800, (samples, tokens), generator=generator).tolist()
    engine = he.HybridEngine(model)
    one = he.SamplingParams(max_new_tokens=1, stop_token_ids=())
    shared = he.SamplingParams(max_new_tokens=1, stop_token_ids=(), n=samples)
    found: dict[str, Any] = {}
    for name, call in {
        "shared": lambda: engine.generate(prompts[:1], shared),
        "different": lambda: engine.generate(prompts, one),
    }.items():
        seconds = []
        for _ in range(4):
            start = time.perf_counter()
            computed = _prefilled_tokens(call)
            seconds.append(time.perf_counter() - start)
        found[name] = {"ms": min(seconds[1:]) * 1e3, "tokens": computed}
    return found


def _prefilled_tokens(call: Callable[[], object]) -> int:
    """How many tokens the call sends through the layers."""
    counts = []
    hidden_states = Decoder.hidden_states

    def counted(self: Decoder, batch: Any, *args: Any) -> Any:
        counts.append(len(batch.tokens))
        return hidden_states(self, batch, *args)

    with mock.patch.object(Decoder, "hidden_states", counted):
        call()
    return sum(counts)
