"""A PPO iteration as light trainers write it: any rollout, then forwards that keep their logits.

The baseline of `rlhf bench step`. Losses, advantages and optimizer are those of `rlhf`, so that
what differs is what is measured: the rollout, and log-probs through a (B, T, V) tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from rlhf.advantages import gae, shape_rewards, whiten
from rlhf.bench.models import StepModels
from rlhf.bench.peers import Answer, Request
from rlhf.bench.peers.hf import pad_left
from rlhf.config import PPOConfig
from rlhf.engines import TrainingEngine
from rlhf.kl import k1
from rlhf.losses import policy_loss, value_loss
from rlhf.models import response_values, sequence_scores
from rlhf.tracking import Stopwatch

Rollout = Callable[[Request], Answer]


def full_logprobs(
    model: nn.Module, input_ids: Tensor, prompt_lengths: Tensor, response_lengths: Tensor
) -> Tensor:
    """(B, T) fp32 log-probs of the response tokens, through the logits of every position."""
    logits = model(input_ids=input_ids, use_cache=False).logits.float()  # (B, P + T, V)
    chosen = logits.log_softmax(-1)[:, :-1].gather(2, input_ids[:, 1:, None]).squeeze(2)
    steps = torch.arange(int(response_lengths.max()), device=input_ids.device)
    mask = steps < response_lengths.unsqueeze(1)  # (B, T)
    columns = (prompt_lengths.unsqueeze(1) - 1 + steps).clamp(max=chosen.shape[1] - 1)
    return chosen.gather(1, columns) * mask


class PlainLoop:
    """Iterations on a batch of prompts; of the last, `phases` has the seconds."""

    def __init__(
        self, models: StepModels, rollout_of: Callable[[TrainingEngine], Rollout], engines: Any,
        config: PPOConfig, stop_token_ids: tuple[int, ...],
    ) -> None:  # fmt: skip
        """
        Args:
            rollout_of: makes the rollout from the actor's engine.
            engines: what makes engines, such as `rlhf.engines.Engines()`.
        """
        self._models, self._config, self._stop = models, config, stop_token_ids
        reference = deepcopy(models.actor).requires_grad_(False)
        steps = config.iterations * config.epochs
        self.actor: TrainingEngine = engines.training(
            models.actor, config.actor_optimizer, total_steps=steps, role="actor"
        )
        self._critic: TrainingEngine = engines.training(
            models.critic, config.critic_optimizer, total_steps=steps, role="critic"
        )
        self.rollout = rollout_of(self.actor)
        self._reference = engines.frozen(reference, role="reference")
        self._reward = engines.frozen(models.reward, role="reward")
        self.phases: dict[str, float] = {}
        self.tokens = 0

    def iterate(self, prompts: list[list[int]]) -> None:
        self._watch = Stopwatch()
        with self._watch("rollout"):
            request = Request(prompts, self._config.max_new_tokens, 1.0, self._stop)
            answer = self.rollout(request)
        with self._watch("score"):
            batch = self._score(prompts, answer)
        for _ in range(self._config.epochs):
            self._update(*batch)
        self.phases = self._watch.seconds

    @torch.no_grad()
    def _score(self, prompts: list[list[int]], answer: Answer) -> tuple[Tensor, ...]:
        device = next(self._models.actor.parameters()).device
        rows = [[*prompt, *tokens] for prompt, tokens in zip(prompts, answer.tokens, strict=True)]
        flipped, mask = pad_left([row[::-1] for row in rows], device)  # left of the flip is right
        input_ids, totals = flipped.flip(1), mask.sum(1)
        self.tokens = int(totals.sum())
        prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        lengths = totals - prompt_lengths
        parts = torch.arange(len(rows), device=device).split(self._config.micro_batch_size)

        def by_part(engine: Any, function: Any, *arguments: Tensor) -> Tensor:
            found = [engine(function, *(a[part] for a in arguments)) for part in parts]
            width = max(f.shape[-1] for f in found) if found[0].dim() > 1 else 0
            return torch.cat(
                [nn.functional.pad(f, (0, width - f.shape[1])) if width else f for f in found]
            )

        batch = (input_ids, prompt_lengths, lengths)
        old = by_part(self.actor, full_logprobs, *batch)
        reference = by_part(self._reference, full_logprobs, *batch)
        values = by_part(self._critic, response_values, *batch)
        scores = by_part(self._reward, sequence_scores, input_ids, totals)
        keep = torch.arange(old.shape[1], device=device) < lengths.unsqueeze(1)
        config = self._config
        rewards = shape_rewards(
            scores, k1(old, reference), lengths, kl_coef=config.kl_coef, clip=config.reward_clip
        )
        advantages, returns = gae(rewards, values, keep, gamma=config.gamma, lam=config.lam)
        return *batch, old, values, whiten(advantages, keep), returns, keep

    def _update(self, *batch: Tensor) -> None:
        config, tokens = self._config, int(batch[-1].sum())
        for part in torch.arange(len(batch[0])).split(config.micro_batch_size):
            input_ids, prompt_lengths, lengths, old, values, advantages, returns, keep = (
                column[part.to(column.device)] for column in batch
            )
            place = (input_ids, prompt_lengths, lengths)
            width = int(lengths.max())
            cut = slice(None), slice(0, width)
            with self._watch("update_actor"):
                new = self.actor(full_logprobs, *place)
                loss = policy_loss(
                    new, old[cut], advantages[cut], keep[cut], cliprange=config.cliprange
                ).loss
                self.actor.backward(loss / tokens)
            with self._watch("update_critic"):
                guess = self._critic(response_values, *place)
                value = value_loss(
                    guess, values[cut], returns[cut], keep[cut],
                    cliprange_value=config.cliprange_value,
                ).loss  # fmt: skip
                self._critic.backward(value / tokens)
        with self._watch("update_actor"):
            self.actor.step()
        with self._watch("update_critic"):
            self._critic.step()
