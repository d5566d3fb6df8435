"""Hugging Face `generate` with a static cache and a compiled forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rlhf.bench.peers import Answer, Generator, Request, hf
from rlhf.bench.subject import Subject

ABOUT = "transformers generate, static cache, torch.compile"


def why_not(subject: Subject) -> str | None:
    return None


@contextmanager
def generator(subject: Subject) -> Iterator[Generator]:
    model = subject.model
    eager = model.forward
    mode = "reduce-overhead" if subject.device.type == "cuda" else "default"
    compiled = torch.compile(eager, mode=mode, fullgraph=True)

    def generate(request: Request) -> Answer:
        model.forward = compiled
        try:
            return hf.generate(model, request, cache_implementation="static", disable_compile=True)
        finally:
            model.forward = eager  # the others run the same model

    try:
        yield generate
    finally:
        del model.forward  # what the class has
        torch.compiler.reset()
