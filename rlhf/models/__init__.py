"""Hugging Face models: loading, saving, and the three things that training reads from them."""

from rlhf.models.forward import (
    completion_logprobs,
    response_logprobs,
    response_values,
    sequence_scores,
)
from rlhf.models.loading import build_causal_lm, load_causal_lm, load_scorer, parameter_count
from rlhf.models.saving import save_model

__all__ = [
    "build_causal_lm",
    "completion_logprobs",
    "load_causal_lm",
    "load_scorer",
    "parameter_count",
    "response_logprobs",
    "response_values",
    "save_model",
    "sequence_scores",
]
