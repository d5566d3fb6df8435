"""The four models of a PPO iteration, with random weights or a checkpoint's."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rlhf.bench.subject import Subject
from rlhf.plan.known import known_config


@dataclass(frozen=True)
class StepModels:
    """Actor and critic are trained. Whoever needs a reference copies the actor before."""

    actor: nn.Module
    critic: nn.Module
    reward: nn.Module


def step_models(
    subject: Subject, critic: str | None, *, stop: tuple[int, ...], copied: bool = True
) -> StepModels:
    """The subject as actor, a copy of it or itself; scorers of the critic's shape."""
    from transformers import AutoModelForSequenceClassification

    config: Any = deepcopy(subject.model.config) if critic is None else known_config(critic)
    if config is None:
        raise ValueError(f"no critic {critic!r}: give a known name, as for --model")
    if config.vocab_size != subject.shape.vocab:
        raise ValueError(
            f"critic {critic} has a vocabulary of {config.vocab_size}, the actor one of "
            f"{subject.shape.vocab}: a reward model reads the actor's tokens"
        )
    config.num_labels, config.pad_token_id = 1, 0
    torch.manual_seed(1)
    with torch.device(subject.device):
        scorer = AutoModelForSequenceClassification.from_config(config, dtype=subject.dtype).eval()
    actor = deepcopy(subject.model) if copied else subject.model
    for settings in (actor.config, actor.generation_config):
        settings.eos_token_id = list(stop) or None
        settings.pad_token_id = 0
    return StepModels(actor, scorer, deepcopy(scorer))
