"""The models of an RLHF run, and the rollout engine on the actor's weights."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedTokenizerBase

from hybrid_engine import EngineConfig, HybridEngine
from rlhf.engines import Engines
from rlhf.models import reference_of
from rlhf.rewards import Reward, Scorer


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
        self.frozen_reference = self.engines.frozen(self.reference, role="reference")
        self.tokenizer = tokenizer
        self.reward = reward if isinstance(reward, Reward) else Reward(model=reward)
        self.reward.place_model(self.engines)
        self.rollout_engine = HybridEngine(actor, engine_config)
