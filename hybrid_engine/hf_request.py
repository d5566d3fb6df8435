"""Translate what HF's `generate` prepared into the engine's terms, or say why not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process
from transformers.generation import stopping_criteria as stopping

from hybrid_engine.generation import SamplingParams


class NotServedError(Exception):
    """The engine does not do this; the message is the reason."""


# What each of HF's processors means in SamplingParams.
_PROCESSORS: dict[type, Callable[[Any, int], dict[str, Any]]] = {
    logits_process.TemperatureLogitsWarper: lambda p, _: {"temperature": float(p.temperature)},
    logits_process.TopKLogitsWarper: lambda p, _: {"top_k": int(p.top_k)},
    logits_process.TopPLogitsWarper: lambda p, _: {"top_p": float(p.top_p)},
    logits_process.MinPLogitsWarper: lambda p, _: {"min_p": float(p.min_p)},
    logits_process.RepetitionPenaltyLogitsProcessor: lambda p, _: {
        "repetition_penalty": float(p.penalty)
    },
    logits_process.MinLengthLogitsProcessor: lambda p, width: {
        "min_new_tokens": max(0, p.min_length - width)
    },
    logits_process.MinNewTokensLengthLogitsProcessor: lambda p, _: {
        "min_new_tokens": p.min_new_tokens
    },
}
_OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
_HARMLESS = {"attention_mask", "use_cache", "past_key_values", "position_ids", "logits_to_keep"}


def read_request(
    model: Any,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: Any,
    model_kwargs: dict[str, Any],
) -> tuple[list[list[int]], SamplingParams, int]:
    """Prompts without their padding, sampling parameters, pad token. Raises NotServedError."""
    _check_model(model)
    _check_outputs(config, streamer, model_kwargs)
    width = input_ids.shape[1]
    options = _stopping_options(criteria, width)
    options |= {"temperature": 1.0 if config.do_sample else 0.0}
    for processor in processors:
        translate = _PROCESSORS.get(type(processor))
        if translate is None:
            raise NotServedError(f"the logits processor {type(processor).__name__}")
        options |= translate(processor, width)
    options["min_new_tokens"] = min(options.get("min_new_tokens", 0), options["max_new_tokens"])
    if config.do_sample:  # so that torch.manual_seed decides, as it does in HF's loop
        options["seed"] = int(torch.randint(2**31 - 1, ()))
    pad = config._pad_token_tensor
    pad_token_id = 0 if pad is None else int(pad)
    prompts = _prompts(input_ids, model_kwargs.get("attention_mask"))
    return prompts, SamplingParams(**options), pad_token_id


def _check_model(model: nn.Module) -> None:
    if model.training and any(
        isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()
    ):
        raise NotServedError("dropout is active in train mode; call model.eval()")
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        raise NotServedError("autocast; load the weights in the type to generate in")
    if any(getattr(parameter, "ds_status", None) is not None for parameter in model.parameters()):
        raise NotServedError("the parameters are partitioned by ZeRO-3")


def _check_outputs(config: GenerationConfig, streamer: Any, model_kwargs: dict[str, Any]) -> None:
    if streamer is not None:
        raise NotServedError("a streamer")
    if config.return_dict_in_generate:
        for name in _OUTPUTS:
            if getattr(config, name):
                raise NotServedError(f"{name}=True")
    cache = model_kwargs.get("past_key_values")
    if cache is not None and cache.get_seq_length() > 0:
        raise NotServedError("past_key_values with tokens in them")
    for name, value in model_kwargs.items():
        if name not in _HARMLESS and value is not None:
            raise NotServedError(f"the model argument {name}")


def _stopping_options(criteria: StoppingCriteriaList, width: int) -> dict[str, Any]:
    options: dict[str, Any] = {"stop_token_ids": ()}
    for criterion in criteria:
        if type(criterion) is stopping.MaxLengthCriteria:
            options["max_new_tokens"] = criterion.max_length - width
        elif type(criterion) is stopping.EosTokenCriteria:
            options["stop_token_ids"] = tuple(criterion.eos_token_id.flatten().tolist())
        else:
            raise NotServedError(f"the stopping criterion {type(criterion).__name__}")
    if options.get("max_new_tokens", 0) < 1:
        raise NotServedError("no room for new tokens under max_length")
    return options


def _prompts(input_ids: Tensor, attention_mask: Tensor | None) -> list[list[int]]:
    rows = input_ids.tolist()
    if attention_mask is None:
        return rows
    mask = attention_mask.long()
    if mask.shape != input_ids.shape or bool((mask.diff(dim=1) < 0).any()):
        raise NotServedError("an attention mask that is no left padding")
    if bool((mask[:, -1] == 0).any()):
        raise NotServedError("a prompt that is nothing but padding")
    counts = mask.sum(1).tolist()
    return [row[len(row) - count :] for row, count in zip(rows, counts, strict=True)]
