"""Small models in the hands of DeepSpeed, for the tests of the ranks."""

from __future__ import annotations

from typing import Any

from torch import nn


def initialize(model: nn.Module, *, stage: int = 3, bf16: bool = False, **zero: Any) -> Any:
    """A DeepSpeed engine that trains what requires a gradient, by torch's AdamW, unclipped."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0, **zero},
        "bf16": {"enabled": bf16},
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(model=model, model_parameters=trained, config=config)
    return engine


def train_one_step(engine: Any) -> None:
    """One optimizer step on a fixed batch."""
    import torch

    tokens = torch.arange(20).view(2, 10) + 3
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
