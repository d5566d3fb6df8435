"""Starting DeepSpeed for one model, and leaving nothing of it behind."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist

from rlhf.bench.subject import Subject


@contextmanager
def started(subject: Subject, more: dict[str, Any]) -> Iterator[Any]:
    """DeepSpeed's engine over a copy of the model."""
    with process_group(subject.device):
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": subject.dtype == torch.bfloat16},
            "fp16": {"enabled": subject.dtype == torch.float16},
            **more,
        }
        engine, *_ = deepspeed.initialize(model=deepcopy(subject.model), config=config)
        try:
            yield engine
        finally:
            engine.destroy()


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """A group of this process alone, unless a launcher has made one."""
    before = dict(os.environ)
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if device.type == "cpu":  # else it compiles a collective that one machine does not need
        sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    if dist.is_initialized():
        yield
        return
    os.environ.setdefault("LOCAL_RANK", "0")
    with tempfile.NamedTemporaryFile() as store:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{store.name}", rank=0, world_size=1,
        )  # fmt: skip
        try:
            yield
        finally:
            deepspeed.comm.destroy_process_group()
            deepspeed.comm.comm.cdb = None
            os.environ.clear()  # others take its variables for a launcher's
            os.environ.update(before)
