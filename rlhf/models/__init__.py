"""Hugging Face models: loading, saving, and the three things that training reads from them."""

from rlhf.models.ema import MovingAverage
from rlhf.models.forward import (
    completion_logprobs,
    response_logprobs,
    response_values,
    sequence_logprobs,
    sequence_scores,
)
from rlhf.models.loading import (
    build_causal_lm,
    load_causal_lm,
    load_critic,
    load_scorer,
    parameter_count,
)
from rlhf.models.lora import adapters_off, add_adapters, has_adapters, reference_of, whole_model
from rlhf.models.positions import check_positions, positions_of
from rlhf.models.saving import save_model

__all__ = [
    "MovingAverage",
    "adapters_off",
    "add_adapters",
    "build_causal_lm",
    "check_positions",
    "completion_logprobs",
    "has_adapters",
    "load_causal_lm",
    "load_critic",
    "load_scorer",
    "parameter_count",
    "positions_of",
    "reference_of",
    "response_logprobs",
    "response_values",
    "save_model",
    "sequence_logprobs",
    "sequence_scores",
    "whole_model",
]
