"""The rollout loop of Colossal-AI's Coati, re-created from its published description.

Colossal-AI itself pins torch <= 2.5.1. Its loop makes one HF forward a token, filters and samples
with torch operations, appends by `cat`, and asks the host after every token whether all sequences
have finished. The better of its two variants is taken, the one that keeps the KV cache.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rlhf.bench.peers import Answer, Generator, Request, hf
from rlhf.bench.subject import PAD, Subject

ABOUT = "Coati's loop re-created: HF forward, torch sampling, a host check a token"


def why_not(subject: Subject) -> str | None:
    return None


@contextmanager
def generator(subject: Subject) -> Iterator[Generator]:
    yield lambda request: generate(subject, request)


@torch.no_grad()
def generate(subject: Subject, request: Request) -> Answer:
    model = subject.model
    ids, mask = hf.pad_left(request.prompts, subject.device)
    width, fresh, cache = ids.shape[1], ids, None
    stop = torch.tensor(request.stop_token_ids, device=ids.device, dtype=ids.dtype)
    unfinished = torch.ones_like(ids[:, 0])
    for _ in range(request.new_tokens):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -fresh.shape[1] :]
        inputs = {"attention_mask": mask, "position_ids": positions}
        output = model(fresh, **inputs, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits = output.logits[:, -1]
        if request.temperature > 0:
            shares = torch.softmax(logits / request.temperature, dim=-1, dtype=torch.float)
            tokens = torch.multinomial(shares, num_samples=1).squeeze(1)
        else:
            tokens = logits.argmax(-1)
        tokens = tokens * unfinished + PAD * (1 - unfinished)
        ids = torch.cat([ids, tokens[:, None]], dim=-1)
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=-1)
        unfinished = unfinished * ~torch.isin(tokens, stop)
        if unfinished.max() == 0:  # waits for the device, every token
            break
        fresh = tokens[:, None]
    return hf.cut(ids[:, width:], request)
