"""Hugging Face `generate` as it comes: eager, a dynamic cache, left padding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from rlhf.bench.peers import Answer, Generator, Request
from rlhf.bench.subject import PAD, Subject

ABOUT = "transformers generate, eager, dynamic cache"


def why_not(subject: Subject) -> str | None:
    return None


@contextmanager
def generator(subject: Subject) -> Iterator[Generator]:
    yield lambda request: generate(subject.model, request)


def generate(model: Any, request: Request, **options: Any) -> Answer:
    """`model.generate` on a request; `options` go to it."""
    return cut(new_tokens(model, request, **options), request)


@torch.no_grad()
def new_tokens(model: Any, request: Request, **options: Any) -> Tensor:
    """(B, T), padded after the end."""
    ids, mask = pad_left(request.prompts, model.device)
    output = model.generate(ids, attention_mask=mask, **settings(request), **options)
    generated: Tensor = output[:, ids.shape[1] :]
    return generated


def settings(request: Request) -> dict[str, Any]:
    """Of HF's generation: the whole distribution, or greedy; exactly so many tokens."""
    sampling: dict[str, Any] = {"do_sample": False}
    if request.temperature > 0:
        sampling = {"do_sample": True, "temperature": request.temperature, "top_k": 0, "top_p": 1.0}
    return {
        "max_new_tokens": request.new_tokens,
        "eos_token_id": list(request.stop_token_ids) or None,
        "pad_token_id": PAD,
        **sampling,
    }


def pad_left(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """(B, P) ids and mask."""
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), PAD)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids.to(device), mask.to(device)


def cut(tokens: Tensor, request: Request) -> Answer:
    """(B, T) up to and including the first stop token of each row."""
    stop = set(request.stop_token_ids)
    rows: list[list[int]] = tokens.tolist()
    ends = [next((i + 1 for i, token in enumerate(row) if token in stop), len(row)) for row in rows]
    return Answer([row[:end] for row, end in zip(rows, ends, strict=True)])
