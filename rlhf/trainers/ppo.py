"""Step 3, PPO: the actor generates, four models score, actor and critic learn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hybrid_engine import EngineConfig, HybridEngine, Rollout, SamplingParams
from rlhf import distributed
from rlhf.advantages import gae, masked_mean, shape_rewards, whiten
from rlhf.config import PPOConfig
from rlhf.data import collate_right, length_mask
from rlhf.engines import Engine, Engines
from rlhf.experience import Experience
from rlhf.kl import KLController, k1
from rlhf.losses import policy_loss, value_loss
from rlhf.models import reference_of, response_logprobs, response_values, sequence_scores
from rlhf.tracking import Stopwatch
from rlhf.trainers.statistics import UpdateStatistics

# Scores of B sequences from right-padded ids (B, L), prompt lengths and total lengths (B,).
Scorer = Callable[[Tensor, Tensor, Tensor], Tensor]


class RLHFEngine:
    """The four models of PPO, and the rollout engine on the actor's weights.

    The reference is the actor as it comes in: a frozen copy, or, of an actor with adapters, the
    actor without them. The reward is a one-label classifier, or any `Scorer`.
    """

    def __init__(
        self,
        actor: nn.Module,
        critic: nn.Module,
        reward: nn.Module | Scorer,
        tokenizer: PreTrainedTokenizerBase,
        *,
        engine_config: EngineConfig | None = None,
        engines: Engines | None = None,
    ) -> None:
        self.engines = engines or Engines()
        self.actor = actor.eval()  # dropout would make every log-prob noisy
        self.critic = critic.eval()
        self.reference = reference_of(actor)
        self.tokenizer = tokenizer
        self.frozen_reference = self.engines.frozen(self.reference, role="reference")
        self.score: Scorer = (
            model_scorer(self.engines.frozen(reward, role="reward"))
            if isinstance(reward, nn.Module)
            else reward
        )
        self.rollout_engine = HybridEngine(actor, engine_config)


def model_scorer(reward: Engine) -> Scorer:
    """The scores of a reward model that shares the actor's tokenizer."""
    reward.module.eval().requires_grad_(False)
    return lambda ids, prompt_lengths, lengths: reward(sequence_scores, ids, lengths)


class PPOTrainer:
    """`generate_experience`, then `train_rlhf`, as often as there are prompts."""

    def __init__(self, engine: RLHFEngine, config: PPOConfig, *, seed: int = 0) -> None:
        self.engine = engine
        self.config = config
        self.metrics: dict[str, float] = {}  # of the last iteration
        self.iteration = 0  # finished iterations
        self.kl = KLController(config.kl_coef, target=config.kl_target, horizon=config.kl_horizon)
        self._seed = seed
        self._order = torch.Generator().manual_seed(seed)
        steps = config.iterations * config.epochs * config.mini_batches
        self._actor = engine.engines.training(
            engine.actor, config.actor_optimizer, total_steps=steps, role="actor"
        )
        self._critic = engine.engines.training(
            engine.critic, config.critic_optimizer, total_steps=steps, role="critic"
        )
        self._watch = Stopwatch()

    def generate_experience(self, prompts: Sequence[Sequence[int]]) -> Experience:
        """Roll out the actor on token-id prompts, score the responses, shape the rewards.

        Ranks divide the prompts among them, and all have the whole experience afterwards.
        """
        self._watch = Stopwatch()
        ours = [list(prompt) for prompt in distributed.share(prompts)]
        with self._watch("rollout"), self._actor.gathered():
            rollout = self._roll_out(ours)
        with self._watch("score"), torch.no_grad():
            experience = self._shape(self._score(ours, rollout))
        self._log_experience(experience)
        return experience

    def train_rlhf(self, experience: Experience) -> tuple[float, float]:
        """Update actor and critic on one experience; returns their mean losses."""
        statistics = UpdateStatistics()
        for _ in range(self.config.epochs):
            for mini_batch in self._mini_batches(experience):
                self._update(mini_batch, statistics)
        self.iteration += 1
        kl = (experience.old_logprobs - experience.ref_logprobs).sum(1).mean()
        self.kl.update(float(kl), len(experience))
        statistics.add_up_ranks()
        self._log_update(experience, statistics)
        return statistics.mean("policy_loss"), statistics.mean("value_loss")

    # ---- experience ------------------------------------------------------------------------------

    def _roll_out(self, prompts: list[list[int]]) -> Rollout:
        params = SamplingParams(
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            seed=(self._seed * 1_000_003 + self.iteration) % 2**31,
        )
        return self.engine.rollout_engine.generate(prompts, params)

    def _score(self, prompts: Sequence[Sequence[int]], rollout: Rollout) -> dict[str, Tensor]:
        """The columns of Experience that the models give, for this rank's prompts."""
        config, engine = self.config, self.engine
        input_ids, prompt_lengths = self._join(prompts, rollout)
        lengths = rollout.lengths
        parts = list(_slices(len(prompts), config.micro_batch_size))

        def by_part(function: Callable[[slice], Tensor]) -> Tensor:
            return _cat_padded([function(part) for part in parts])

        def logprobs(model: Engine) -> Tensor:
            return by_part(
                lambda part: model(
                    response_logprobs, input_ids[part], prompt_lengths[part], lengths[part],
                    temperature=config.temperature,
                )[0]
            )  # fmt: skip

        from_rollout = config.old_logprobs == "rollout"
        old_logprobs = rollout.logprobs if from_rollout else logprobs(self._actor)  # (B, T)
        ref_logprobs = logprobs(engine.frozen_reference)  # (B, T)
        values = by_part(
            lambda part: self._critic(
                response_values, input_ids[part], prompt_lengths[part], lengths[part]
            )
        )  # (B, T)
        ended = torch.tensor(
            [reason == "stop" for reason in rollout.finish_reasons], device=input_ids.device
        )
        scores = torch.cat(
            [
                engine.score(input_ids[p], prompt_lengths[p], (prompt_lengths + lengths)[p])
                for p in parts
            ]
        )  # (B,)
        return {
            "input_ids": input_ids,
            "prompt_lengths": prompt_lengths,
            "response_lengths": lengths,
            "old_logprobs": old_logprobs,
            "ref_logprobs": ref_logprobs,
            "values": values,
            "scores": scores - config.missing_eos_penalty * ~ended,
            "ended": ended,
        }

    def _shape(self, columns: dict[str, Tensor]) -> Experience:
        """Rewards, advantages and returns of the whole batch."""
        config = self.config
        pad_id: Any = self.engine.tokenizer.pad_token_id
        columns = distributed.gather_rows(columns, padding={"input_ids": pad_id})
        lengths, values = columns["response_lengths"], columns["values"]
        mask = length_mask(lengths, values.shape[1])
        rewards = shape_rewards(
            columns["scores"], k1(columns["old_logprobs"], columns["ref_logprobs"]), lengths,
            kl_coef=self.kl.coef, clip=config.reward_clip,
        )  # fmt: skip  # (B, T)
        advantages, returns = gae(rewards, values, mask, gamma=config.gamma, lam=config.lam)
        return Experience(
            **columns, rewards=rewards, advantages=whiten(advantages, mask), returns=returns
        )

    def _join(self, prompts: Sequence[Sequence[int]], rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Right-padded prompts with their responses (B, P + T), and the prompt lengths (B,)."""
        sequences = [[*prompt, *rollout.response(i)] for i, prompt in enumerate(prompts)]
        pad_id: Any = self.engine.tokenizer.pad_token_id
        input_ids, _ = collate_right(sequences, pad_id)
        prompt_lengths = torch.tensor([len(prompt) for prompt in prompts])
        device = rollout.tokens.device
        return input_ids.to(device), prompt_lengths.to(device)

    # ---- update ----------------------------------------------------------------------------------

    def _mini_batches(self, experience: Experience) -> Iterator[Experience]:
        order = torch.randperm(len(experience), generator=self._order)
        for rows in order.tensor_split(min(self.config.mini_batches, len(order))):
            yield experience.select(rows.to(experience.input_ids.device))

    def _update(self, batch: Experience, statistics: UpdateStatistics) -> None:
        """One optimizer step of each model; sums over micro-batches over one global count."""
        tokens = int(batch.response_mask.sum())
        train_actor = self.iteration >= self.config.critic_warmup
        by_length = batch.lengths.argsort(stable=True)
        ours = by_length[distributed.rank() :: distributed.world_size()]
        for part in ours.split(self.config.micro_batch_size):
            micro = batch.select(part)
            with self._watch("update_actor"):
                loss = self._policy_loss(micro, statistics)
                if train_actor:
                    self._actor.backward(loss / tokens)
            with self._watch("update_critic"):
                self._critic.backward(self._value_loss(micro, statistics) / tokens)
        with self._watch("update_actor"):
            if train_actor:
                statistics.actor_step(self._actor.step())
        with self._watch("update_critic"):
            statistics.critic_step(self._critic.step())

    def _policy_loss(self, micro: Experience, statistics: UpdateStatistics) -> Tensor:
        logprobs, entropy = self._actor(
            response_logprobs, micro.input_ids, micro.prompt_lengths, micro.response_lengths,
            temperature=self.config.temperature,
        )  # fmt: skip
        mask = micro.response_mask
        result = policy_loss(
            logprobs, micro.old_logprobs, micro.advantages, mask, cliprange=self.config.cliprange
        )
        gap = (logprobs.detach() - micro.old_logprobs).abs()
        statistics.add_policy(result, entropy.detach().sum(), gap, mask)
        return result.loss

    def _value_loss(self, micro: Experience, statistics: UpdateStatistics) -> Tensor:
        values = self._critic(
            response_values, micro.input_ids, micro.prompt_lengths, micro.response_lengths
        )
        result = value_loss(
            values, micro.values, micro.returns, micro.response_mask,
            cliprange_value=self.config.cliprange_value,
        )  # fmt: skip
        statistics.add_value(result)
        return result.loss

    # ---- metrics ---------------------------------------------------------------------------------

    def _log_experience(self, experience: Experience) -> None:
        kl = k1(experience.old_logprobs, experience.ref_logprobs)
        mask = experience.response_mask
        non_score = -self.kl.coef * kl.sum(1)  # (B,)
        self.metrics = {
            "objective/kl": float(kl.sum(1).mean()),
            "objective/entropy": float(-experience.old_logprobs.sum(1).mean()),
            "objective/non_score_reward": float(non_score.mean()),
            "objective/rlhf_reward": float((experience.scores + non_score).mean()),
            "objective/scores": float(experience.scores.mean()),
            "objective/kl_coef": self.kl.coef,
            "val/num_eos_tokens": float(experience.ended.sum()),
            "val/response_length": float(experience.response_lengths.float().mean()),
            "val/explained_variance": _explained_variance(experience, mask),
        }

    def _log_update(self, experience: Experience, statistics: UpdateStatistics) -> None:
        seconds = self._watch.seconds
        total = sum(seconds.values())
        new_tokens = float(experience.response_lengths.sum())
        self.metrics |= statistics.metrics()
        self.metrics |= {f"timing_s/{name}": value for name, value in seconds.items()}
        self.metrics |= {
            "timing_s/step": total,
            "perf/rollout_tokens_per_s": new_tokens / seconds["rollout"],
            "perf/tokens_per_s": float(experience.lengths.sum()) / total,
            "episode": float(self.iteration * len(experience)),
        }


def _explained_variance(experience: Experience, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns), over response tokens."""

    def variance(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, mask)).square(), mask)

    unexplained = variance(experience.returns - experience.values)
    return float(1 - unexplained / variance(experience.returns).clamp(min=1e-8))


def _slices(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, start + size)


def _cat_padded(parts: list[Tensor]) -> Tensor:
    """(b_i, t_i) tensors of different widths as one (B, T), zero-padded at the right."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])
