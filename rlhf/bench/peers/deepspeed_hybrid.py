"""The DeepSpeed hybrid engine: its injected kernels on the training weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from rlhf.bench.deepspeed_start import started
from rlhf.bench.measure import versions
from rlhf.bench.peers import Answer, Generator, Request, hf
from rlhf.bench.subject import Subject

ABOUT = "DeepSpeed hybrid engine, ZeRO-2, kernels injected"


def why_not(subject: Subject) -> str | None:
    found = versions(["deepspeed", "transformers"])
    if "deepspeed" not in found:
        return "deepspeed is not installed: pip install deepspeed"
    if subject.device.type != "cuda":
        return "its injected kernels are CUDA only"
    if subject.dtype != torch.float16:
        return "its kernels are measured in float16: give --dtype float16"
    if int(found["transformers"].split(".")[0]) >= 5:
        return f"it does not inject under transformers {found['transformers']}: it wants 4.x"
    return None


@contextmanager
def generator(subject: Subject) -> Iterator[Generator]:
    config = {
        "zero_optimization": {"stage": 2},
        "hybrid_engine": {"enabled": True, "max_out_tokens": subject.shape.positions or 2048},
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-6, "torch_adam": True}},
    }
    with started(subject, config) as engine:
        engine.eval()

        def generate(request: Request) -> Answer:
            ids, mask = hf.pad_left(request.prompts, subject.device)
            settings = hf.settings(request)
            output = engine.generate(ids, attention_mask=mask, **settings)
            return hf.cut(output[:, ids.shape[1] :], request)

        yield generate
