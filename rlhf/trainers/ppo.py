"""Step 3: the actor generates, the models and functions score, actor and critic learn.

PPO and the group methods are one loop; what differs is a row of the table in `algorithms`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from datasets import Dataset

from hybrid_engine import Rollout, SamplingParams, sequence_seeds
from rlhf import distributed
from rlhf.advantages import AdvantageFunction
from rlhf.checkpoint import Saved
from rlhf.config import PPOConfig
from rlhf.engines import TrainingEngine
from rlhf.experience import Experience
from rlhf.kl import KLController
from rlhf.losses import aggregation_weights
from rlhf.models import MovingAverage
from rlhf.rewards import PendingScores
from rlhf.tracking import Stopwatch
from rlhf.trainers.algorithms import choose_algorithm
from rlhf.trainers.objectives import actor_loss, critic_loss
from rlhf.trainers.ptx import MixtureData
from rlhf.trainers.rlhf_engine import RLHFEngine
from rlhf.trainers.scoring import gather, leave_out_skipped, measure_rollout, score, shape
from rlhf.trainers.statistics import UpdateStatistics, experience_metrics, speed_metrics

T = TypeVar("T")

MIXTURE_SEED = 7919  # apart from the prompts' order


class PPOTrainer:
    """`generate_experience`, then `train_rlhf`, as often as there are prompts."""

    def __init__(
        self,
        engine: RLHFEngine,
        config: PPOConfig,
        *,
        seed: int = 0,
        advantage: AdvantageFunction | None = None,
        mixture: Dataset | None = None,
    ) -> None:
        """
        Args:
            advantage: instead of the algorithm's own: (B, T) from rewards, response mask (B, T)
                and prompt numbers (B,).
            mixture: encoded rows {input_ids, loss_mask} for `config.ptx_coef`.

        Raises ValueError where the algorithm needs a critic and there is none, or the mixture.
        """
        self.engine = engine
        self.config = config
        self.metrics: dict[str, float] = {}  # of the last iteration
        self.iteration = 0  # finished iterations
        self.kl = KLController(config.kl_coef, target=config.kl_target, horizon=config.kl_horizon)
        self.algorithm = choose_algorithm(config, advantage)
        self._seed = seed
        self._order = torch.Generator().manual_seed(seed)
        steps = config.iterations * config.epochs * config.mini_batches
        self.actor = engine.engines.training(
            engine.actor, config.actor_optimizer, total_steps=steps, role="actor"
        )
        self.reference = engine.reference_engine(self.actor)
        self.critic: TrainingEngine | None = None
        if self.algorithm.advantage is None:
            if engine.critic is None:
                raise ValueError(f"{config.algorithm} needs a critic, RLHFEngine has None")
            self.critic = engine.engines.training(
                engine.critic, config.critic_optimizer, total_steps=steps, role="critic"
            )
        self._mixture = self._mixture_of(mixture)
        self.average: MovingAverage | None = None
        if config.ema_decay is not None:
            self.average = MovingAverage(
                engine.actor, decay=config.ema_decay, offload=engine.engines.offloads("ema")
            )
        self._watch = Stopwatch()

    def generate_experience(
        self,
        prompts: Sequence[Sequence[int]],
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> Experience:
        """Roll out the actor on token-id prompts, score the responses, shape the rewards.

        Ranks divide the prompts among them, and all have the whole experience afterwards.

        Args:
            columns: for reward functions, an entry for each prompt: "prompt", the prompt as text or
                messages (default: the tokens decoded), and whatever else the data has.

        Raises ValueError if the policy has left the reference by more than `kl_limit`, or there are
        fewer prompts than ranks.
        """
        engine, config = self.engine, self.config
        self._watch = Stopwatch()
        if len(prompts) < (ranks := distributed.world_size()):
            raise ValueError(
                f"a rollout of {len(prompts)} prompts for {ranks} processes: raise batch_size, or "
                "give more prompts"
            )
        for name, column in (columns or {}).items():
            if len(column) != len(prompts):
                raise ValueError(
                    f"column {name} has {len(column)} entries for {len(prompts)} prompts"
                )
        repeated = [list(prompt) for prompt in self._ours(prompts)]
        with self._watch("rollout"), self.actor.for_rollout():
            pending = self._pending(repeated, columns or {})
            rollout = self._roll_out(repeated, self._seeds(prompts), pending)
        with self._watch("score"):
            experience = measure_rollout(
                engine,
                config,
                repeated,
                rollout,
                actor=self.actor,
                critic=self.critic,
                reference=self.reference,
            )
            scores = score(engine, config, experience, pending)
            pad_id = int(engine.tokenizer.pad_token_id)
            experience, scores = gather(experience, scores, pad_id=pad_id)
            experience = leave_out_skipped(experience)
            shape(config, self.algorithm, experience, kl_coef=self.kl.coef)
        self.metrics = experience_metrics(
            experience, scores, kl_coef=self.kl.coef, reward_clip=config.reward_clip
        )
        self._check_kl(experience)
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
        self.metrics |= statistics.metrics() | speed_metrics(self._watch.seconds, experience)
        self.metrics["episode"] = float(self.iteration * len(experience))
        return statistics.mean("policy_loss"), statistics.mean("value_loss")

    # ---- checkpoints -----------------------------------------------------------------------------

    @property
    def saved(self) -> dict[str, Saved]:
        """What writes its own part of a checkpoint."""
        parts = {"actor": self.actor, "critic": self.critic, "average": self.average}
        return {name: part for name, part in parts.items() if part is not None}

    def state_dict(self) -> dict[str, Any]:
        """What is the same on every rank; the data's position is with whoever has the data."""
        mixture = self._mixture
        return {
            "iteration": self.iteration,
            "kl_coef": self.kl.coef,
            "order": self._order.get_state(),
            "mixture": None if mixture is None else mixture.batches.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.iteration = state["iteration"]
        self.kl.coef = state["kl_coef"]
        self._order.set_state(state["order"])
        if self._mixture is not None and state["mixture"] is not None:
            self._mixture.batches.load_state_dict(state["mixture"])

    # ---- experience ------------------------------------------------------------------------------

    def _ours(self, column: Sequence[T]) -> list[T]:
        """This rank's share of a column, each entry once for every response."""
        n = self.config.samples_per_prompt
        return [cell for cell in distributed.share(column) for _ in range(n)]

    def _pending(
        self, prompts: list[list[int]], columns: Mapping[str, Sequence[Any]]
    ) -> PendingScores:
        repeated = {name: self._ours(column) for name, column in columns.items()}
        tokenizer = self.engine.tokenizer
        texts: list[Any] = repeated.pop("prompt", [])
        reward = self.engine.reward
        if not texts and (reward.functions or reward.model_tokenizer is not None):
            texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts]
        return reward.start(texts or prompts, repeated, tokenizer)

    def _seeds(self, prompts: Sequence[Sequence[int]]) -> list[int]:
        """Of this rank's responses: all ranks' differ, and are those of one process."""
        n = self.config.samples_per_prompt
        every = [list(prompt) for prompt in prompts for _ in range(n)]
        seeds = sequence_seeds(every, (self._seed * 1_000_003 + self.iteration) % 2**31)
        ours = distributed.share(range(len(prompts)))
        return [seed for i in ours for seed in seeds[i * n : (i + 1) * n]]

    def _roll_out(
        self, prompts: list[list[int]], seeds: list[int], pending: PendingScores
    ) -> Rollout:
        config = self.config
        params = SamplingParams(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
        )
        engine = self.engine.rollout_engine
        return engine.generate(prompts, params, seeds=seeds, on_finish=pending.submit)

    def _check_kl(self, experience: Experience) -> None:
        tokens = float(experience.response_lengths.sum())
        kl = float((experience.old_logprobs - experience.ref_logprobs).sum()) / tokens
        if not kl <= self.config.kl_limit:
            raise ValueError(
                f"the policy has left the reference: {kl:.1f} nats per token in iteration "
                f"{self.iteration + 1}, over kl_limit={self.config.kl_limit:g}. Lower the learning "
                "rate or epochs, raise kl_coef, or set kl_target"
            )

    # ---- update ----------------------------------------------------------------------------------

    def _mini_batches(self, experience: Experience) -> Iterator[Experience]:
        order = torch.randperm(len(experience), generator=self._order)
        for rows in order.tensor_split(min(self.config.mini_batches, len(order))):
            yield experience.select(rows.to(experience.input_ids.device))

    def _update(self, batch: Experience, statistics: UpdateStatistics) -> None:
        """One optimizer step of each model; sums over micro-batches weighted by global counts."""
        config = self.config
        train_actor = self.iteration >= config.critic_warmup
        tokens, sequences = int(batch.response_mask.sum()), len(batch)
        by_length = batch.lengths.argsort(stable=True)
        for places, weight in distributed.even_parts(len(batch), config.micro_batch_size):
            micro = batch.select(by_length[list(places)])
            counted = statistics if weight else UpdateStatistics()
            with self._watch("update_actor"):
                weights = aggregation_weights(
                    self.algorithm.aggregation, micro.response_lengths, tokens=tokens,
                    sequences=sequences, max_length=config.max_new_tokens,
                )  # fmt: skip
                loss = actor_loss(
                    self.actor, micro, weights, counted, config=config, algorithm=self.algorithm,
                    kl_coef=self.kl.coef,
                )  # fmt: skip
                if train_actor:
                    self.actor.backward(loss * weight)
            if self.critic is not None:
                with self._watch("update_critic"):
                    loss = critic_loss(self.critic, micro, counted, config=config)
                    self.critic.backward(loss * (weight / tokens))
        with self._watch("update_actor"):
            if train_actor:
                self._step_actor(statistics)
        if self.critic is not None:
            with self._watch("update_critic"):
                statistics.critic_step(self.critic.step())
        statistics.end_mini_batch()

    def _step_actor(self, statistics: UpdateStatistics) -> None:
        config = self.config
        if self._mixture is not None:
            loss = self._mixture.backward(
                self.actor, coef=config.ptx_coef, micro_batch_size=config.micro_batch_size
            )
            statistics.add_mixture(loss)
        info = self.actor.step()
        statistics.actor_step(info)
        if self.average is not None and not info.is_skipped:
            self.average.update()

    def _mixture_of(self, rows: Dataset | None) -> MixtureData | None:
        config = self.config
        if not config.ptx_coef:
            return None
        if rows is None:
            raise ValueError("ptx_coef needs rows to learn from: give PPOTrainer a mixture")
        responses = config.batch_size * config.samples_per_prompt
        return MixtureData(
            rows, -(-responses // config.mini_batches), seed=self._seed + MIXTURE_SEED,
            pad_id=int(self.engine.tokenizer.pad_token_id),
        )  # fmt: skip
