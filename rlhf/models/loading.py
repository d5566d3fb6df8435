"""Models from local folders, the hub, or a config with random weights."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerBase,
)

from hybrid_engine.models import FAMILIES, find_family


def load_causal_lm(
    path: str, tokenizer: PreTrainedTokenizerBase, *, dtype: torch.dtype
) -> nn.Module:
    """A causal language model from a folder or the hub, of a family that the engine knows.

    Its embedding grows if the tokenizer has more tokens. Raises ValueError if there is no such
    model, it is a reward model or critic, or its family is unknown.
    """
    what = "causal language model"
    with _not_found(what, path):
        config = AutoConfig.from_pretrained(path)
    if _has_score_head(config):
        raise ValueError(
            f"{path} is no causal language model: it scores, as a reward model or critic does; "
            "give the folder of an SFT model or an actor"
        )
    model = _from_pretrained(AutoModelForCausalLM, what, path, dtype=dtype)
    find_family(model)
    return _with_special_tokens(model, tokenizer)


def build_causal_lm(
    init: dict[str, Any], tokenizer: PreTrainedTokenizerBase, *, dtype: torch.dtype
) -> nn.Module:
    """A causal language model with random weights; `init` is its config with its model_type."""
    tokens = {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    options = {"vocab_size": len(tokenizer), **tokens, **init}
    model_type = options.pop("model_type")
    if model_type not in FAMILIES:
        raise ValueError(
            f"model.init: the hybrid engine does not know the model family {model_type!r}; it "
            f"knows {', '.join(sorted(FAMILIES))}"
        )
    _check_names(options, AutoConfig.for_model(model_type))
    try:
        config = AutoConfig.for_model(model_type, **options)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        reason = str(error.__cause__ or error)
        raise ValueError(f"model.init describes no causal language model: {reason}") from error
    find_family(model)
    return _with_special_tokens(model, tokenizer)


def load_scorer(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: torch.dtype,
    fresh_head: bool = False,
) -> nn.Module:
    """A sequence classification model with one label: reward model or critic.

    Args:
        fresh_head: take a causal language model too, its body below a new score head with random
            weights, which is yet to be trained.

    Raises ValueError if there is no such model, it has no score head, or more than one label.
    """
    with _not_found("reward model", path):
        config = AutoConfig.from_pretrained(path)
        trained = _has_score_head(config)
        if trained and config.num_labels != 1:
            raise ValueError(f"it has {config.num_labels} labels, a reward model has 1")
    if not (trained or fresh_head):
        raise ValueError(
            f"{path} is no reward model: it has no score head; train one with `rlhf reward`"
        )
    model = _from_pretrained(
        AutoModelForSequenceClassification, "reward model", path, dtype=dtype, num_labels=1,
        fresh=() if trained else ("score.weight",),
    )  # fmt: skip
    return _with_special_tokens(model, tokenizer)


def load_critic(path: str, tokenizer: PreTrainedTokenizerBase, *, dtype: torch.dtype) -> Any:
    """A critic from a reward model; from a causal language model, with a score head of zeros.

    All its values are 0 then until it learns. Raises ValueError as `load_scorer` does.
    """
    critic: Any = load_scorer(path, tokenizer, dtype=dtype, fresh_head=True)
    if not _has_score_head(AutoConfig.from_pretrained(path)):
        nn.init.zeros_(critic.score.weight)
    return critic


def parameter_count(model: nn.Module) -> int:
    """Distinct parameters; tied ones count once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _from_pretrained(
    kind: Any, what: str, path: str, *, fresh: Collection[str] = (), **options: Any
) -> Any:
    """A model with all its weights but the `fresh` ones, which HF would make up without a word.

    Raises ValueError where there is none, or weights are missing or of another shape.
    """
    with _not_found(what, path):
        model, found = kind.from_pretrained(
            path, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
        names = {*found["missing_keys"]} | {name for name, *_ in found["mismatched_keys"]}
        if wrong := sorted(names - {*fresh}):
            raise ValueError(
                f"{len(wrong)} weights of its config are missing in its files or have another shape"
                f" there, such as {wrong[0]}"
            )
    return model


def _check_names(options: dict[str, Any], default: Any) -> None:
    """A config keeps any name that it is given: raise ValueError for one that is nearly its own."""
    known = {*default.to_dict(), *default.attribute_map}
    for name in options.keys() - known:
        if close := difflib.get_close_matches(name, known, n=1, cutoff=0.8):
            raise ValueError(
                f"model.init: {default.model_type} has no {name!r}; is {close[0]!r} meant?"
            )


def _has_score_head(config: Any) -> bool:
    """Whether the model that this config was saved with is a sequence classifier."""
    return any("SequenceClassification" in name for name in config.architectures or [])


def _with_special_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> nn.Module:
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer))
    for settings in (model.config, getattr(model, "generation_config", None)):
        if settings is None:
            continue
        settings.pad_token_id = tokenizer.pad_token_id
        if getattr(settings, "bos_token_id", None) is None:
            settings.bos_token_id = tokenizer.bos_token_id
        settings.eos_token_id = _stop_at(tokenizer.eos_token_id, settings.eos_token_id)
    return model


def _stop_at(eos: Any, known: int | list[int] | None) -> int | list[int] | None:
    """What ends a response: the model's own tokens, and before them `eos` if it is not of them."""
    stops = [] if known is None else [known] if isinstance(known, int) else list(known)
    if eos in stops:
        return known
    return [eos, *stops] if stops else eos


@contextlib.contextmanager
def _not_found(what: str, path: str) -> Iterator[None]:
    """Errors of loading as one ValueError that says what was looked for, and where."""
    try:
        yield
    except (OSError, ValueError, StrictDataclassError, SafetensorError) as error:
        where = "the folder" if Path(path).is_dir() else "a local folder and the Hugging Face hub"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"no {what} {path!r} (tried {where}): {reason}") from error
