"""Hugging Face `generate` on a model that DeepSpeed has partitioned by ZeRO-3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from rlhf.bench.deepspeed_start import started
from rlhf.bench.measure import versions
from rlhf.bench.peers import Answer, Generator, Request, hf
from rlhf.bench.subject import Subject
from rlhf.engines import TrainingEngine

ABOUT = "HF generate under DeepSpeed ZeRO-3, weights gathered layer by layer"


def why_not(subject: Subject) -> str | None:
    if "deepspeed" not in versions(["deepspeed"]):
        return "deepspeed is not installed: pip install deepspeed"
    return None


@contextmanager
def generator(subject: Subject) -> Iterator[Generator]:
    config = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    with started(subject, config) as engine:

        def generate(request: Request) -> Answer:
            return hf.generate(engine.module, request, synced_gpus=dist.get_world_size() > 1)

        yield generate


def sharded_rollout(actor: TrainingEngine) -> Generator:
    """HF generate inside the engine's forward, where DeepSpeed gathers each layer as it runs."""

    def roll_out(request: Request) -> Answer:
        synced = dist.get_world_size() > 1
        return hf.cut(actor(hf.new_tokens, request, synced_gpus=synced), request)

    return roll_out
