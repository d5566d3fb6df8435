"""TRL's rollout without a server: the unwrapped model's own `generate`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rlhf.bench.measure import versions
from rlhf.bench.peers import Answer, Generator, Request, hf
from rlhf.bench.subject import Subject

ABOUT = "TRL's unwrap_model_for_generation and generate, as in its online trainers"


def why_not(subject: Subject) -> str | None:
    if "trl" not in versions(["trl"]):
        return "trl is not installed: pip install trl"
    return None


@contextmanager
def generator(subject: Subject) -> Iterator[Generator]:
    from accelerate import Accelerator
    from trl.models.utils import unwrap_model_for_generation

    accelerator = Accelerator(cpu=subject.device.type == "cpu")
    model: Any = accelerator.prepare_model(subject.model, evaluation_mode=True)

    def generate(request: Request) -> Answer:
        with unwrap_model_for_generation(model, accelerator) as unwrapped:
            return hf.generate(unwrapped, request)

    yield generate
