"""DeepSpeed itself: imported, and given a model.

What its start would compile, print or refuse without need on a machine without a GPU is taken out.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class Caller(nn.Module):
    """The one module whose forward DeepSpeed sees: it runs any function on the model.

    DeepSpeed gathers weights where their modules' forwards begin. Those that a function reads by
    itself, the head's, it is told of.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return function(self.module, *args, **kwargs)

    def read_by_functions(self) -> list[nn.Parameter]:
        head: Any = getattr(self.module, "get_output_embeddings", lambda: None)()
        return [] if head is None else list(head.parameters())


def initialise(
    module: nn.Module, config: dict[str, Any], optimizer: torch.optim.Optimizer | None
) -> Any:
    """DeepSpeed's engine of a module, called as `engine(function, *args)`; None: not trained."""
    deepspeed, caller = load_deepspeed(), Caller(module)
    if not deepspeed.comm.is_initialized():
        if "RANK" not in os.environ and not dist.is_initialized():
            _form_group_of_one()
        deepspeed.init_distributed(verbose=False)
    engine, *_ = deepspeed.initialize(model=caller, optimizer=optimizer, config=config)
    if config["zero_optimization"]["stage"] == 3:
        for parameter in caller.read_by_functions():
            deepspeed.zero.register_external_parameter(caller, parameter)
    return engine


def _form_group_of_one() -> None:
    """For a process that nobody launched. DeepSpeed by itself would ask MPI who it is, and reads
    the variables of a launcher again later."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    os.environ |= {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
    }  # fmt: skip


@functools.cache
def load_deepspeed() -> Any:
    """The package, with its start-up made quick and quiet. Raises ValueError if it is missing."""
    os.environ.setdefault("DS_LOG_LEVEL", "warning")
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # DeepSpeed calls collectives by names that newer torch deprecates.
    warnings.filterwarnings("ignore", message="`torch.distributed", category=FutureWarning)
    try:
        import deepspeed
    except ImportError as error:
        raise ValueError(
            "training on several processes, ZeRO and offload need DeepSpeed: "
            "pip install 'hybrid-rlhf[deepspeed]'"
        ) from error
    # On a CPU it would compile collectives in shared memory for minutes; gloo has them.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    accelerator = deepspeed.accelerator.get_accelerator()
    if accelerator.device_name() == "cpu":  # it asks for instructions that torch does without
        accelerator.is_fp16_supported = lambda: True
    return deepspeed
