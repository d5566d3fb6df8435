"""Hugging Face continuous batching: a paged cache, requests that come and go."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rlhf.bench.peers import Answer, Generator, Request, hf
from rlhf.bench.subject import Subject

ABOUT = "transformers continuous batching, its manager started for each call"


def why_not(subject: Subject) -> str | None:
    if not hasattr(subject.model, "generate_batch"):
        return "this transformers has no generate_batch"
    if subject.device.type != "cuda":
        return "its paged cache is sized from the memory of a GPU"
    return None


@contextmanager
def generator(subject: Subject) -> Iterator[Generator]:
    from transformers import GenerationConfig

    model = subject.model

    def generate(request: Request) -> Answer:
        settings = hf.settings(request)
        settings["eos_token_id"] = settings["eos_token_id"] or -1
        # Kept, its manager would keep most of the memory while the others have their turn.
        found = model.generate_batch(request.prompts, GenerationConfig(**settings))
        return Answer([list(output.generated_tokens) for output in found.values()])

    yield generate
