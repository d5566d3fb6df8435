"""A model and batches that every rank, and the single process they are compared with, can make."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf import distributed
from rlhf.config import OptimizerConfig, TrainingConfig
from rlhf.engines import Engines, TrainingEngine
from rlhf.models import completion_logprobs
from rlhf.trainers.columns import micro_batches

STEPS, ROWS, MICRO = 4, 8, 2
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, max_grad_norm=0.5)
# Else DeepSpeed keeps weights this small whole, and ZeRO 3 is not tested.
PERSIST_NOTHING = '{"zero_optimization": {"stage3_param_persistence_threshold": 0}}'


def llama(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A random Llama with 280 tokens, the same in every process."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(_config()).to(dtype)


def scorer(seed: int) -> nn.Module:
    """A random classifier with one label."""
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(seed)
    return LlamaForSequenceClassification(_config())


def _config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=280, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, num_labels=1,
    )  # fmt: skip


def batch(step: int) -> dict[str, list[list[int]]]:
    """Rows of unequal lengths, so that a mean of means would be wrong."""
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(3, 24, (ROWS,), generator=generator).tolist()
    ids = [torch.randint(6, 280, (n,), generator=generator).tolist() for n in lengths]
    return {"input_ids": ids, "loss_mask": [[0, *[1] * (len(row) - 1)] for row in ids]}


def negative_logprobs(engine: TrainingEngine, rows: dict[str, Any]) -> Tensor:
    from rlhf.data import collate_right

    ids, _ = collate_right(rows["input_ids"], 0)
    mask, _ = collate_right(rows["loss_mask"], 0)
    return -engine(completion_logprobs, ids, mask.bool()).sum()


def train_step(engine: TrainingEngine, step: int) -> dict[str, float]:
    rows = batch(step)
    count = sum(map(sum, rows["loss_mask"]))
    loss = 0.0
    for micro, weight in micro_batches(rows, MICRO):
        part = negative_logprobs(engine, micro) * (weight / count)
        engine.backward(part)
        loss += float(part.detach())
    info = engine.step()
    return {
        "loss": distributed.total(loss)[0],
        "lr": info.learning_rate,
        **info.metrics(),
    }


def engine_of(
    model: nn.Module, zero_stage: int | None = None, steps: int = STEPS, **training: Any
) -> TrainingEngine:
    engines = Engines(TrainingConfig(**training), zero_stage=zero_stage)  # type: ignore[arg-type]
    return engines.training(model, OPTIMIZER, total_steps=steps)
