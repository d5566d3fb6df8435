"""The baseline of the DeepSpeed-Chat paper: HF `generate` on each rank's share, DDP in training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from rlhf.bench.peers import Generator, hf
from rlhf.bench.subject import Subject
from rlhf.config import OptimizerConfig
from rlhf.engines import PlainEngine, SingleProcessEngine

ABOUT = "HF generate on each rank's share of the prompts, DDP in training"


def why_not(subject: Subject) -> str | None:
    if not (dist.is_available() and dist.is_initialized()):
        return "needs ranks: torchrun --nproc-per-node N -m rlhf.cli.main bench ..."
    return None


@contextmanager
def generator(subject: Subject) -> Iterator[Generator]:
    with hf.generator(subject) as generate:  # the ranks have their shares already
        yield generate


class _Call(nn.Module):
    """Its forward is any function of the module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(self.module, *arguments)


class DistributedEngine(SingleProcessEngine):
    """torch's DistributedDataParallel: whole weights and optimizer on every rank."""

    def __init__(self, module: nn.Module, config: OptimizerConfig, *, total_steps: int) -> None:
        super().__init__(module, config, total_steps=total_steps)
        self._distributed = nn.parallel.DistributedDataParallel(
            _Call(module), find_unused_parameters=True
        )

    def __call__(self, function: Any, /, *arguments: Any, **options: Any) -> Any:
        if torch.is_grad_enabled():
            return self._distributed(function, *arguments, **options)
        return function(self.module, *arguments, **options)


class DistributedEngines:
    """What `PlainLoop` asks of engines."""

    def training(
        self, module: nn.Module, config: OptimizerConfig, *, total_steps: int, role: str
    ) -> DistributedEngine:
        return DistributedEngine(module, config, total_steps=total_steps)

    def frozen(self, module: nn.Module, *, role: str) -> PlainEngine:
        return PlainEngine(module)
