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
    """On a GPU HF compiles a static cache's decode step by itself, with CUDA graphs; elsewhere its
    whole forward is compiled here."""
    model = subject.model
    by_hf = subject.device.type == "cuda"
    compiled = None if by_hf else torch.compile(model.forward, fullgraph=True)

    def generate(request: Request) -> Answer:
        if compiled is not None:
            model.forward = compiled
        try:
            return hf.generate(
                model, request, cache_implementation="static", disable_compile=not by_hf
            )
        finally:
            vars(model).pop("forward", None)  # the others run the same model

    try:
        yield generate
    finally:
        vars(model).pop("_compiled_call", None)  # HF's
        torch.compiler.reset()
