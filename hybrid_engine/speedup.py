"""How much faster is it here? Hugging Face's loop against the engine, on the user's own model."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import nn

from hybrid_engine.accelerate import plain_generation, unwrap
from hybrid_engine.eval_mode import eval_mode


def measure_speedup(
    model: nn.Module,
    *,
    batch: int = 8,
    prompt_tokens: int = 32,
    new_tokens: int = 64,
    repeats: int = 3,
) -> float:
    """Time of HF's `generate` over that of the accelerated model's, sampling on random prompts.

    Both generate exactly `new_tokens` for `batch` prompts, in turn; medians of `repeats` after one
    warm-up. About 1 for a model that is not accelerated.
    """
    target: Any = unwrap(model)
    vocab = target.get_output_embeddings().weight.shape[0]
    ids = torch.randint(vocab, (batch, prompt_tokens), device=target.device)
    seconds: dict[str, list[float]] = {"plain": [], "accelerated": []}
    with eval_mode(target):
        for _ in range(repeats + 1):
            with plain_generation(target):
                seconds["plain"].append(_time(target, ids, new_tokens))
            seconds["accelerated"].append(_time(target, ids, new_tokens))
    plain, accelerated = (statistics.median(times[1:]) for times in seconds.values())
    return plain / accelerated


def _time(model: Any, ids: torch.Tensor, new_tokens: int) -> float:
    start = time.perf_counter()
    model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, pad_token_id=0,
        min_new_tokens=new_tokens, max_new_tokens=new_tokens,
    )  # fmt: skip
    if ids.is_cuda:
        torch.cuda.synchronize(ids.device)
    return time.perf_counter() - start
