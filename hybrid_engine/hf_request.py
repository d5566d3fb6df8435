"""Translate what HF's `generate` prepared into the engine's terms, or say why not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import logits_process
from transformers.generation import stopping_criteria as stopping

from hybrid_engine.generation import SamplingParams, sequence_seeds
from hybrid_engine.weights import sharded_parameters, whole_shape


class NotServedError(Exception):
    """The engine does not do this; the message is the reason."""


def _whole(processor: Any) -> Any:
    """The filter, if its mass alone says what it keeps."""
    if processor.min_tokens_to_keep > 1:
        raise NotServedError(f"min_tokens_to_keep={processor.min_tokens_to_keep}")
    return processor


def _penalty(processor: Any) -> float:
    if processor.prompt_ignore_length:
        raise NotServedError("a repetition penalty that ignores the prompt")
    return float(processor.penalty)


# What each of HF's processors means in SamplingParams, in the order in which the engine applies
# them. Two change no token: one replaces what the engine refuses, the last one renormalises what
# the engine normalises anyway.
_PROCESSORS: dict[type, Callable[[Any, int], dict[str, Any]]] = {
    logits_process.RepetitionPenaltyLogitsProcessor: lambda p, _: {
        "repetition_penalty": _penalty(p)
    },
    logits_process.MinLengthLogitsProcessor: lambda p, width: {
        "min_new_tokens": max(0, p.min_length - width)
    },
    logits_process.MinNewTokensLengthLogitsProcessor: lambda p, _: {
        "min_new_tokens": p.min_new_tokens
    },
    logits_process.InfNanRemoveLogitsProcessor: lambda p, _: {},
    logits_process.TemperatureLogitsWarper: lambda p, _: {"temperature": float(p.temperature)},
    logits_process.TopKLogitsWarper: lambda p, _: {"top_k": int(p.top_k)},
    # 0 keeps one token, as the smallest mass does
    logits_process.TopPLogitsWarper: lambda p, _: {"top_p": float(_whole(p).top_p) or 1e-30},
    logits_process.MinPLogitsWarper: lambda p, _: {"min_p": float(_whole(p).min_p)},
    logits_process.LogitNormalization: lambda p, _: {},
}
_OUTPUTS = ("output_attentions", "output_hidden_states")
_HARMLESS = {
    "attention_mask", "use_cache", "past_key_values", "position_ids", "logits_to_keep", "tokenizer",
}  # fmt: skip


@dataclass(frozen=True)
class Request:
    """What the engine is asked for."""

    prompts: list[list[int]]  # without their padding
    params: SamplingParams
    pad_token_id: int

    def seeds(self) -> list[int]:
        """Of each response's draws: torch's generator decides alone, as it does in HF's loop."""
        repeated = [prompt for prompt in self.prompts for _ in range(self.params.n)]
        return sequence_seeds(repeated, self.params.seed)


def read_request(
    model: Any,
    input_ids: Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: Any,
    model_kwargs: dict[str, Any],
    *,
    max_positions: int,
) -> Request:
    """A call of HF's decoding loop, for an engine of so many positions. Raises NotServedError."""
    _check_model(model)
    _check_outputs(model, config, model_kwargs)
    mask = model_kwargs.get("attention_mask")
    prompts = _prompts(input_ids, mask)
    if streamer is not None and len(prompts) > 1:
        raise NotServedError("a streamer for several sequences")
    _check_positions(model_kwargs.get("position_ids"), mask, input_ids)
    width = input_ids.shape[1]
    options = _stopping_options(criteria, width, head_rows(model))
    _check_length(prompts, options["max_new_tokens"], max_positions)
    options |= _sampling_options(processors, config, width)
    options["min_new_tokens"] = min(options.get("min_new_tokens", 0), options["max_new_tokens"])
    return Request(prompts, SamplingParams(**options), _pad_token_id(config))


def read_batch_request(
    model: Any,
    prompts: list[list[int]],
    config: GenerationConfig,
    max_new_tokens: int | None,
    *,
    max_positions: int,
) -> Request:
    """A call of HF's `generate_batch`. Raises NotServedError."""
    _check_model(model)
    if config.stop_strings is not None:
        raise NotServedError("stop strings in generate_batch, which is given no tokenizer")
    eos = config.eos_token_id
    eos = getattr(model.config, "eos_token_id", None) if eos is None else eos
    stops = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    longest = max_new_tokens or config.max_new_tokens
    if longest is None:
        raise NotServedError("generate_batch without max_new_tokens")
    _check_length(prompts, longest, max_positions)
    options = _sampling_options(model._get_logits_processor(config), config, 0)
    options["min_new_tokens"] = min(options.get("min_new_tokens", 0), longest)
    params = SamplingParams(
        max_new_tokens=longest,
        stop_token_ids=tuple(
            token for token in stops if 0 <= token < head_rows(model)
        ),  # none is -1 in HF
        n=config.num_return_sequences or 1,
        **options,
    )
    return Request([list(prompt) for prompt in prompts], params, 0)


def head_rows(model: Any) -> int:
    """Tokens that the model can say."""
    return whole_shape(model.get_output_embeddings().weight)[0]


def _check_length(prompts: list[list[int]], max_new_tokens: int, max_positions: int) -> None:
    longest = max(map(len, prompts), default=0) + max_new_tokens
    if longest > max_positions:  # HF goes on past the last position
        raise NotServedError(f"prompt and response may need {longest} positions of {max_positions}")


def _sampling_options(
    processors: LogitsProcessorList, config: GenerationConfig, width: int
) -> dict[str, Any]:
    """The last to be read: from here on HF's loop would not draw what it draws alone."""
    options: dict[str, Any] = {}
    for processor in processors:
        translate = _PROCESSORS.get(type(processor))
        if translate is None:
            raise NotServedError(f"the logits processor {type(processor).__name__}")
        options |= translate(processor, width)
    places = [list(_PROCESSORS).index(type(processor)) for processor in processors]
    if places != sorted(set(places)):
        names = ", ".join(type(processor).__name__ for processor in processors)
        raise NotServedError(f"logits processors in an order of their own: {names}")
    if not config.do_sample:
        options["temperature"] = 0.0
    else:  # so that torch.manual_seed decides, as it does in HF's loop
        options["seed"] = int(torch.randint(2**31 - 1, ()))
    return options


def _pad_token_id(config: GenerationConfig) -> int:
    pad: Tensor | None = config._pad_token_tensor
    return 0 if pad is None else int(pad)


def _check_model(model: Any) -> None:
    if model.training and any(map(_drops, model.modules())):
        raise NotServedError("dropout is active in train mode; call model.eval()")
    prepare = vars(model).get("prepare_inputs_for_generation")
    own = type(model).prepare_inputs_for_generation
    if prepare is not None and getattr(prepare, "__func__", None) is not own:
        raise NotServedError("inputs that another object prepares, as PEFT's soft prompts do")
    if any(map(_mixes_adapters, model.modules())):
        raise NotServedError("adapter_names, another adapter for each row")


def _mixes_adapters(module: nn.Module) -> bool:
    """Whether PEFT has told a LoRA layer which row has which adapter: by a hook, for one call."""
    hooks = module._forward_pre_hooks.values()
    return any("adapter_names" in getattr(hook, "keywords", ()) for hook in hooks)


def _drops(module: nn.Module) -> bool:
    """Whether a module's dropout is active. Many HF modules have a rate and no Dropout module."""
    if isinstance(module, nn.Dropout):
        return module.p > 0
    rates = (rate for name, rate in vars(module).items() if "drop" in name)
    return any(isinstance(rate, float) and rate > 0 for rate in rates)


def _check_outputs(
    model: nn.Module, config: GenerationConfig, model_kwargs: dict[str, Any]
) -> None:
    if (config.output_scores or config.output_logits) and sharded_parameters(model) is not None:
        # they are computed when they are read, by a forward in which every rank would have to join
        raise NotServedError("scores of a model that ZeRO-3 partitions")
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


def _check_positions(
    positions: Tensor | None, mask: Tensor | None, input_ids: Tensor
) -> None:  # fmt: skip
    """HF counts positions from the first token that is no padding; so does the engine."""
    if positions is None:
        return
    ones = torch.ones_like(input_ids) if mask is None else mask.long()
    expected = (ones.cumsum(1) - 1).clamp(min=0)
    if not bool(((positions == expected) | (ones == 0)).all()):
        raise NotServedError("position_ids of its own")


def _stopping_options(criteria: StoppingCriteriaList, width: int, vocab: int) -> dict[str, Any]:
    options: dict[str, Any] = {"stop_token_ids": ()}
    for criterion in criteria:
        if type(criterion) is stopping.MaxLengthCriteria:
            options["max_new_tokens"] = criterion.max_length - width
        elif type(criterion) is stopping.EosTokenCriteria:
            ids = criterion.eos_token_id.flatten().tolist()
            options["stop_token_ids"] = tuple(token for token in ids if 0 <= token < vocab)
        elif type(criterion) is stopping.StopStringCriteria:
            options["stop_strings"] = criterion
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
