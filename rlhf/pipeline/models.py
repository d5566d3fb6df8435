"""Which models a step starts from, and where they lie."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf import distributed
from rlhf.config import ModelConfig
from rlhf.data import (
    DataBlend,
    check_chat_template,
    load_tokenizer,
    other_tokenizer,
    read_chat_template,
    texts_of,
    train_tokenizer,
)
from rlhf.models import add_adapters, build_causal_lm, load_causal_lm, load_critic, load_scorer
from rlhf.pipeline.workspace import Workspace
from rlhf.rewards import Reward, load_function


def first_model(
    config: ModelConfig, data: DataBlend, *, dtype: torch.dtype
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model of SFT; its tokenizer is trained on the demonstrations if there is none.

    Raises ValueError where neither a path nor random weights are asked for.
    """
    if config.path is None and config.init is None:
        raise ValueError(
            "no model: give model.path, a folder or hub name, or model.init, a config for "
            "random weights"
        )
    tokenizer = _first_tokenizer(config, data)
    if config.chat_template is not None:
        check_chat_template(tokenizer)
    if config.init is not None:
        return build_causal_lm(config.init, tokenizer, dtype=dtype), tokenizer
    assert config.path is not None
    pretrained = load_causal_lm(config.path, tokenizer, dtype=dtype)
    return add_adapters(pretrained, config.lora), tokenizer


def load_reward(run: Workspace, tokenizer: PreTrainedTokenizerBase) -> Reward:
    """PPO's reward: a model, functions, or both."""
    config, path = run.config.ppo, _reward_path(run)
    model, own = None, None
    if path is not None:
        own = other_tokenizer(path, tokenizer)
        model = load_scorer(path, own or tokenizer, dtype=run.dtype)
    functions = config.reward_functions
    return Reward(
        [load_function(function, option="ppo.reward_functions") for function in functions],
        weights=config.reward_weights,
        model=model,
        model_weight=config.reward_model_weight if functions else 1.0,
        model_tokenizer=own,
        overlap=config.reward_overlap,
    )


def load_critic_of(
    run: Workspace, actor_path: str, tokenizer: PreTrainedTokenizerBase
) -> nn.Module | None:
    """PPO's critic; None for the group methods."""
    if run.config.ppo.algorithm != "ppo":
        return None
    return load_critic(critic_path(run, actor_path, tokenizer), tokenizer, dtype=run.dtype)


def critic_path(run: Workspace, actor_path: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The given one, else the reward model if it reads the actor's tokens, else the actor."""
    if given := run.config.ppo.critic_path:
        if other_tokenizer(given, tokenizer) is not None:
            raise ValueError(
                f"the critic {given} has another tokenizer than the actor {actor_path}: it has "
                "to read the actor's tokens; give one from the same base model, or none"
            )
        return given
    path = _reward_path(run)
    if path is None or other_tokenizer(path, tokenizer) is not None:
        return actor_path
    return path


def _reward_path(run: Workspace) -> str | None:
    """Of the reward model; None where functions alone score."""
    config = run.config.ppo
    if config.reward_path is None and config.reward_functions:
        return None
    return config.reward_path or run.from_step("reward", "ppo.reward_path")


def _first_tokenizer(config: ModelConfig, data: DataBlend) -> PreTrainedTokenizerBase:
    if source := config.tokenizer or config.path:
        return load_tokenizer(
            source, chat_template=config.chat_template, eos_token=config.eos_token
        )
    texts = texts_of(row for part in data.parts("train") for row in part)
    template = config.chat_template and read_chat_template(config.chat_template)
    return distributed.decided_by_first(
        lambda: train_tokenizer(texts, vocab_size=config.vocab_size, chat_template=template)
    )
