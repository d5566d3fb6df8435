"""DeepSpeed's configuration of one model, from our options and the user's JSON."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf.config import Offload, TrainingConfig
from rlhf.engines.single import FIRST_LOSS_SCALE, LOSS_SCALE_WINDOW

# Sections that our own options decide; DeepSpeed would take them from two places.
OURS = {
    "optimizer": "the step's optimizer options",
    "scheduler": "the step's optimizer.schedule",
    "gradient_clipping": "the step's optimizer.max_grad_norm",
    "train_batch_size": "the step's batch_size",
    "train_micro_batch_size_per_gpu": "the step's micro_batch_size",
    "gradient_accumulation_steps": "batch_size and micro_batch_size",
    "managed_gradient_accumulation": "batch_size and micro_batch_size",
}
UNSERVED = ("hybrid_engine", "pipeline", "tensor_parallel", "compile")


@dataclass(frozen=True)
class Sharding:
    """What is decided for one model."""

    zero_stage: int
    offload: Offload
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError(
                f"offload=all moves weights to the CPU, which needs ZeRO stage 3, got stage "
                f"{self.zero_stage}; give --zero_stage 3 or offload=optimizer"
            )
        if self.offload == "optimizer" and self.zero_stage == 0:
            raise ValueError("offload=optimizer needs a ZeRO stage of 1 to 3, got 0")


def deepspeed_config(
    sharding: Sharding, training: TrainingConfig, *, max_grad_norm: float | None
) -> dict[str, Any]:
    """The configuration of a model that is trained, or with max_grad_norm None only read.

    Gradients add up until `step`, over as many backwards as there are. Raises ValueError when the
    user's file is missing, is not JSON, or sets what our options decide.
    """
    zero: dict[str, Any] = {"stage": sharding.zero_stage, "overlap_comm": sharding.zero_stage >= 2}
    device = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    if max_grad_norm is not None and sharding.offload != "none":
        zero["offload_optimizer"] = device
    if sharding.offload == "all":
        zero["offload_param"] = device
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": max_grad_norm or 0.0,  # what is not written is 1.0
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": sharding.dtype == torch.bfloat16},
        "fp16": {
            "enabled": sharding.dtype == torch.float16,
            "initial_scale_power": round(math.log2(FIRST_LOSS_SCALE)),
            "loss_scale_window": LOSS_SCALE_WINDOW,
            "hysteresis": 1,  # overflows until the scale is halved
        },
        "steps_per_print": None,
    }
    if training.deepspeed_config is None:
        return config
    return merged(config, read_user_config(training.deepspeed_config))


def read_user_config(path: str) -> dict[str, Any]:
    """The user's JSON, checked against what is ours to decide."""
    try:
        user = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"training.deepspeed_config {path}: {error}") from error
    if not isinstance(user, dict):
        raise ValueError(f"training.deepspeed_config {path}: expected an object, got {user!r:.40}")
    for section, option in OURS.items():
        if section in user:
            raise ValueError(
                f"training.deepspeed_config {path} sets {section}; that is {option} here, so take "
                "it out of the file"
            )
    for section in UNSERVED:
        if section in user:
            raise ValueError(f"training.deepspeed_config {path}: {section} is not served")
    return user


def merged(config: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`config` with the entries of `over`, section by section. "auto" leaves ours as it is."""
    result = copy.deepcopy(config)
    for name, value in over.items():
        if isinstance(value, dict) and isinstance(result.get(name), dict):
            result[name] = merged(result[name], value)
        elif value != "auto":
            result[name] = copy.deepcopy(value)
    return result
