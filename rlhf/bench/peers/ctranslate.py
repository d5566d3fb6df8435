"""CTranslate2: a C++ engine for CPUs and GPUs, on a converted copy of the weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from rlhf.bench.measure import versions
from rlhf.bench.peers import Answer, Generator, Request
from rlhf.bench.subject import Subject

ABOUT = "CTranslate2 on a converted copy of the weights"
TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


def why_not(subject: Subject) -> str | None:
    if "ctranslate2" not in versions(["ctranslate2"]):
        return "ctranslate2 is not installed: pip install ctranslate2"
    import ctranslate2

    supported = ctranslate2.get_supported_compute_types(subject.device.type)
    if (wanted := TYPES[subject.dtype]) not in supported:
        return f"no {wanted} on this device: {', '.join(sorted(supported))}"
    return None


@contextmanager
def generator(subject: Subject) -> Iterator[Generator]:
    import ctranslate2

    with tempfile.TemporaryDirectory() as folder:
        _convert(subject, Path(folder))
        engine = ctranslate2.Generator(
            f"{folder}/converted", device=subject.device.type, compute_type=TYPES[subject.dtype],
            intra_threads=torch.get_num_threads(),
        )  # fmt: skip

        def generate(request: Request) -> Answer:
            results = engine.generate_batch(
                [[f"t{token}" for token in prompt] for prompt in request.prompts],
                max_length=request.new_tokens,
                min_length=0 if request.stop_token_ids else request.new_tokens,
                sampling_topk=1 if request.temperature == 0 else 0,
                sampling_temperature=request.temperature or 1.0,
                end_token=[f"t{token}" for token in request.stop_token_ids] or None,
                include_prompt_in_result=False,
                return_end_token=True,
            )  # fmt: skip
            return Answer([list(result.sequences_ids[0]) for result in results])

        yield generate


def _convert(subject: Subject, folder: Path) -> None:
    """Save with a tokenizer of one word a token, and convert."""
    from ctranslate2.converters import TransformersConverter

    from rlhf.bench.tokenizer import word_tokenizer

    tokenizer = word_tokenizer(subject.shape.vocab)
    subject.model.save_pretrained(folder / "hf")
    tokenizer.save_pretrained(folder / "hf")
    TransformersConverter(str(folder / "hf")).convert(str(folder / "converted"))
