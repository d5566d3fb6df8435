"""Rollout against plain HF `generate`: same weights, same prompts, same sampling, one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from hybrid_engine import HybridEngine, SamplingParams

REPEATS = 3


@dataclass(frozen=True)
class Throughput:
    """Median generated tokens per second, end tokens included, padding not."""

    engine: float
    hf_generate: float
    prompts: int

    @property
    def ratio(self) -> float:
        return self.engine / self.hf_generate


def compare_with_hf_generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
) -> Throughput:
    """Alternate the two, after a warm-up of each, and take medians."""
    model.eval()
    engine = HybridEngine(model)

    def roll_out() -> int:
        rollout = engine.generate(prompts, SamplingParams(max_new_tokens=max_new_tokens))
        return int(rollout.lengths.sum())

    def hf_generate() -> int:
        return _hf_generate(model, tokenizer, prompts, max_new_tokens)

    rates: dict[Callable[[], int], list[float]] = {roll_out: [], hf_generate: []}
    for repeat in range(REPEATS + 1):
        for generate, found in rates.items():
            start = time.perf_counter()
            tokens = generate()
            if repeat:  # the first is the warm-up
                found.append(tokens / (time.perf_counter() - start))
    engine.release()
    return Throughput(
        engine=statistics.median(rates[roll_out]),
        hf_generate=statistics.median(rates[hf_generate]),
        prompts=len(prompts),
    )


def _hf_generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
) -> int:
    width = max(map(len, prompts))
    pad_id, eos_id = tokenizer.pad_token_id, tokenizer.eos_token_id
    device = next(model.parameters()).device
    padded = [[pad_id] * (width - len(p)) + list(p) for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    output = model.generate(  # type: ignore[operator]
        torch.tensor(padded, device=device),
        attention_mask=torch.tensor(mask, device=device),
        max_new_tokens=max_new_tokens,
        do_sample=True,
        top_k=0,
    )
    ended = (output[:, width:] == eos_id).int()
    after_end = ended.cumsum(1) - ended  # 0 up to and including the first EOS
    return int((after_end == 0).sum())
