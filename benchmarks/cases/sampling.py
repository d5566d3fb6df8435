"""Drawing a token, with and without filters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.case import BATCHES, Case, Sweeps, randn, size
from hybrid_engine import ops


def sampling(name: str, batch: int, vocab: int, dtype: torch.dtype, **filters: float) -> Case:
    """Truth is the log-prob of the tokens that each drew: draws differ, log-probs may not."""
    logits = randn(batch, vocab, dtype=dtype) * 4
    temperature = torch.full((batch,), float(filters.get("temperature", 1.0)))
    top_k = torch.full((batch,), int(filters.get("top_k", 0)))
    top_p = torch.full((batch,), float(filters.get("top_p", 1.0)))
    zeros, seeds = torch.zeros(batch), torch.arange(batch)

    def ours(logits: Tensor) -> tuple[Tensor, ...]:
        return ops.sample(logits, temperature, top_k, top_p, zeros, seeds, seeds)

    def plain(logits: Tensor) -> tuple[Tensor, ...]:
        logprobs = torch.log_softmax(logits.float(), -1)
        if name == "greedy":
            tokens = logits.argmax(-1)
            return tokens, logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)
        kept = logits.float()
        if "top_k" in filters:
            least = kept.topk(int(filters["top_k"])).values[:, -1:]
            kept = kept.masked_fill(kept < least, -torch.inf)
        if "top_p" in filters:
            ranked, order = kept.sort(-1, descending=True)
            mass = torch.softmax(ranked, -1).cumsum(-1)
            out = (mass - torch.softmax(ranked, -1)) > filters["top_p"]
            kept = kept.masked_fill(out.scatter(1, order, out), -torch.inf)
        tokens = torch.multinomial(torch.softmax(kept, -1), 1)
        truncated = torch.log_softmax(kept, -1).gather(1, tokens).squeeze(1)
        return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1), truncated

    def error(out: tuple[Tensor, ...], args: tuple[Any, ...]) -> Tensor:
        truth = torch.log_softmax(args[0].double(), -1).gather(1, out[0].unsqueeze(1)).squeeze(1)
        return (out[1] - truth).abs() < 1e-5

    return Case("sample", ours, plain, [(logits,)], size(logits), error)


def sample_greedy(batch: int, vocab: int, dtype: torch.dtype) -> Case:
    return sampling("greedy", batch, vocab, dtype, temperature=0.0)


def sample_full(batch: int, vocab: int, dtype: torch.dtype) -> Case:
    return sampling("full", batch, vocab, dtype)


def sample_top(batch: int, vocab: int, dtype: torch.dtype) -> Case:
    return sampling("top", batch, vocab, dtype, top_k=50, top_p=0.9)


SWEEPS: Sweeps = dict.fromkeys((sample_greedy, sample_full, sample_top), (BATCHES, (32000,)))
