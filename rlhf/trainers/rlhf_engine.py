"""The models of an RLHF run, and the rollout engine on the actor's weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Concatenate, ParamSpec, TypeVar

from torch import nn
from transformers import PreTrainedTokenizerBase

from hybrid_engine import EngineConfig, HybridEngine
from rlhf.engines import Engine, Engines, PlainEngine
from rlhf.models import adapters_off, has_adapters, reference_of
from rlhf.rewards import Reward, Scorer

P = ParamSpec("P")
R = TypeVar("R")


class RLHFEngine:
    """Actor, critic, reference and reward.

    The reference is the actor as it comes in: a frozen copy, or, of an actor with adapters, the
    actor without them. The reward is a one-label classifier, any `Scorer`, or a `Reward` that adds
    such a model and Python functions. Group methods have no critic: None.
    """

    def __init__(
        self,
        actor: nn.Module,
        critic: nn.Module | None,
        reward: nn.Module | Scorer | Reward,
        tokenizer: PreTrainedTokenizerBase,
        *,
        engine_config: EngineConfig | None = None,
        engines: Engines | None = None,
    ) -> None:
        self.engines = engines or Engines()
        self.actor = actor.eval()  # dropout would make every log-prob noisy
        self.critic = None if critic is None else critic.eval()
        self.reference = reference_of(actor)
        self.tokenizer = tokenizer
        self.reward = reward if isinstance(reward, Reward) else Reward(model=reward)
        self.reward.place_model(self.engines)
        self._engine_config = engine_config

    @functools.cached_property
    def rollout_engine(self) -> HybridEngine:
        """Made when it is first used: by then the weights are where training has them."""
        return HybridEngine(self.actor, self._engine_config)

    def reference_engine(self, actor: Engine) -> Engine:
        """The reference by itself, or read through the actor's engine where that has it."""
        if has_adapters(self.actor):
            return ActorWithoutAdapters(actor)
        return self.engines.frozen(self.reference, role="reference")


class ActorWithoutAdapters(PlainEngine):
    """The model of another engine with its adapters off: no second copy, and none of its parts."""

    def __init__(self, actor: Engine) -> None:
        super().__init__(actor.module)
        self._actor = actor

    def __call__(
        self, function: Callable[Concatenate[nn.Module, P], R], /, *args: P.args, **kwargs: P.kwargs
    ) -> R:
        def without(module: nn.Module, *args: P.args, **kwargs: P.kwargs) -> R:
            with adapters_off(module):
                return function(module, *args, **kwargs)

        return self._actor(without, *args, **kwargs)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        with self._actor.gathered(), adapters_off(self.module):
            yield

    @contextlib.contextmanager
    def for_rollout(self) -> Iterator[None]:
        with self._actor.for_rollout(), adapters_off(self.module):
            yield
