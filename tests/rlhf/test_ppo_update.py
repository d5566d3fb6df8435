"""The update: first on the rollout's own policy, with exact token means, touching nothing else."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf.config import OptimizerConfig, PPOConfig
from rlhf.experience import Experience
from rlhf.trainers import PPOTrainer, RLHFEngine

PROMPTS = [[1, 50, 60], [1], [1, *range(70, 82)], [1, 90, 91, 92, 93], [1, 33], [1, 44, 45]]
STOPS = [2, *range(100, 130)]
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_fraction=0.0, max_grad_norm=1e9)


@pytest.fixture
def make(causal_lm, scorer, tokenizer):
    """A trainer on fresh models: the same each time."""

    def make(family: str = "llama", *, reward: Any = None, seed: int = 3, **options: Any):
        actor = causal_lm(family)
        actor.generation_config.eos_token_id = STOPS
        engine = RLHFEngine(
            actor, scorer(family, seed=1), reward or scorer(family, seed=2), tokenizer
        )
        options = {
            "max_new_tokens": 12, "batch_size": len(PROMPTS), "iterations": 10,
            "actor_optimizer": OPTIMIZER, "critic_optimizer": OPTIMIZER, **options,
        }  # fmt: skip
        return PPOTrainer(engine, PPOConfig(**options), seed=seed)

    return make


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def iterate(trainer: PPOTrainer, times: int = 1) -> None:
    for _ in range(times):
        trainer.train_rlhf(trainer.generate_experience(PROMPTS))


@pytest.mark.parametrize("old_logprobs", ["rollout", "recompute"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_first_mini_batch_has_ratio_1(make, family: str, old_logprobs: str) -> None:
    """The best smoke test of the pipeline: within fp32 rounding of log-probs, 1e-5 nats."""
    trainer = make(family, old_logprobs=old_logprobs, micro_batch_size=4)
    iterate(trainer)
    metrics = trainer.metrics
    assert metrics["val/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["val/ratio_var"] == pytest.approx(0.0, abs=1e-6)
    assert 0 <= metrics["policy/approxkl_avg"] < 0.5 * 1e-5**2
    assert metrics["policy/clipfrac_avg"] == 0.0
    assert metrics["val/clipfrac_avg"] == 0.0
    assert metrics["sampling/logp_difference/mean"] < 1e-6
    assert metrics["sampling/logp_difference/max"] < 1e-5


def test_later_mini_batches_leave_the_rollouts_policy(make) -> None:
    trainer = make(epochs=3)
    iterate(trainer)
    assert trainer.metrics["policy/approxkl_avg"] > 1e-4
    assert trainer.metrics["sampling/logp_difference/max"] < 1e-5  # of the first one only


def plain_losses(trainer: PPOTrainer, experience: Experience, rows: range) -> tuple[Tensor, Tensor]:
    """Both losses of one mini-batch by PPO's formulas on each row alone, per response token."""
    cfg = trainer.config
    policy, value, tokens = torch.zeros(()), torch.zeros(()), 0
    for i in rows:
        prompt, length = int(experience.prompt_lengths[i]), int(experience.response_lengths[i])
        ids = experience.input_ids[i : i + 1, : prompt + length]
        logits = trainer.engine.actor(input_ids=ids).logits[0, prompt - 1 : -1]
        logprobs = logits.log_softmax(-1).gather(1, ids[0, prompt:, None]).squeeze(1)
        hidden = trainer.engine.critic.base_model(input_ids=ids).last_hidden_state[0]
        values = trainer.engine.critic.score(hidden[prompt - 1 : -1]).squeeze(-1)
        old, advantages, old_values, returns = (
            getattr(experience, name)[i, :length]
            for name in ("old_logprobs", "advantages", "values", "returns")
        )
        ratio = (logprobs - old).exp()
        held = ratio.clamp(1 - cfg.cliprange, 1 + cfg.cliprange)
        policy = policy + torch.maximum(-advantages * ratio, -advantages * held).sum()
        near = old_values + (values - old_values).clamp(-cfg.cliprange_value, cfg.cliprange_value)
        errors = torch.maximum((values - returns) ** 2, (near - returns) ** 2)
        value = value + 0.5 * errors.sum()
        tokens += length
    return policy / tokens, value / tokens


@pytest.mark.parametrize("micro", [6, 4, 1], ids=lambda m: f"micro{m}")
def test_gradients_are_those_of_the_global_token_mean(make, micro: int) -> None:
    """Micro-batches of unequal lengths weigh by their tokens, so they change nothing."""
    trainer = make(micro_batch_size=micro)
    experience = trainer.generate_experience(PROMPTS)
    assert len(set(experience.response_lengths.tolist())) > 2
    with torch.no_grad():  # away from the rollout's policy, so that both clips hold some tokens
        for parameter in (*trainer.engine.actor.parameters(), *trainer.engine.critic.parameters()):
            parameter.mul_(1.2)
    policy, value = plain_losses(trainer, experience, range(len(PROMPTS)))
    expected = {}
    for name, loss, model in (
        ("policy", policy, trainer.engine.actor),
        ("value", value, trainer.engine.critic),
    ):
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        expected[name] = torch.cat([g.flatten() for g in gradients])
    losses = trainer.train_rlhf(experience)
    assert trainer.metrics["policy/clipfrac_avg"] > 0
    assert trainer.metrics["val/clipfrac_avg"] > 0
    assert losses == pytest.approx((float(policy.detach()), float(value.detach())), rel=1e-4)
    for name, gradient in expected.items():
        found = trainer.metrics[f"{name}/grad_norm"]
        assert found == pytest.approx(float(gradient.norm()), rel=1e-4), name


def test_micro_batches_change_no_weight(make) -> None:
    """Over two iterations of two epochs of two mini-batches."""
    trained = []
    for micro in (6, 2, 1):
        trainer = make(micro_batch_size=micro, epochs=2, mini_batches=2)
        iterate(trainer, 2)
        trained.append(trainer.engine)
    for other in trained[1:]:
        for name in ("actor", "critic"):
            pairs = zip(
                getattr(other, name).parameters(), getattr(trained[0], name).parameters(),
                strict=True,
            )  # fmt: skip
            for found, expected in pairs:
                # Adam divides rounding errors in tiny gradients by eps = 1e-5.
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_reference_never_changes(make, family: str) -> None:
    trainer = make(family)
    before = snapshot(trainer.engine.reference)
    iterate(trainer, 3)
    assert same(trainer.engine.reference.state_dict(), before)
    assert not same(trainer.engine.actor.state_dict(), before)
    memory = {p.untyped_storage().data_ptr() for p in trainer.engine.actor.parameters()}
    for parameter in trainer.engine.reference.parameters():
        assert parameter.untyped_storage().data_ptr() not in memory
        assert not parameter.requires_grad


def test_the_reward_model_never_changes(make, scorer) -> None:
    reward = scorer(seed=2)
    before = snapshot(reward)
    iterate(make(reward=reward), 2)
    assert same(reward.state_dict(), before)
    assert all(p.grad is None for p in reward.parameters())


def test_critic_warmup_leaves_the_actor_untouched(make) -> None:
    trainer = make(critic_warmup=2, epochs=2)
    actor, critic = snapshot(trainer.engine.actor), snapshot(trainer.engine.critic)
    iterate(trainer)
    assert not same(trainer.engine.critic.state_dict(), critic)
    iterate(trainer)
    assert same(trainer.engine.actor.state_dict(), actor)
    assert trainer.metrics["policy/approxkl_avg"] < 1e-10
    iterate(trainer)
    assert not same(trainer.engine.actor.state_dict(), actor)
    assert all(p.grad is None for p in trainer.engine.actor.parameters())


def test_a_run_is_repeated_bitwise_by_its_seed(make, one_thread) -> None:
    def run(seed: int) -> tuple[list[dict[str, Tensor]], dict[str, float]]:
        trainer = make(seed=seed, epochs=2, mini_batches=2, micro_batch_size=4)
        iterate(trainer, 2)
        metrics = {
            name: value
            for name, value in trainer.metrics.items()
            if not name.startswith(("timing_s/", "perf/"))
        }
        return [snapshot(trainer.engine.actor), snapshot(trainer.engine.critic)], metrics

    first, again, other = run(3), run(3), run(4)
    assert all(same(a, b) for a, b in zip(again[0], first[0], strict=True))
    assert again[1] == first[1]
    assert not same(other[0][0], first[0][0])


@pytest.fixture
def visits(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The rows of each mini-batch, if the scores are the rows' numbers."""
    found: list[list[int]] = []
    update = PPOTrainer._update

    def recorded(self: PPOTrainer, batch: Experience, statistics: Any) -> None:
        found.append([int(score) for score in batch.scores])
        update(self, batch, statistics)

    monkeypatch.setattr(PPOTrainer, "_update", recorded)
    return found


def number_rows(ids: Tensor, prompt_lengths: Tensor, lengths: Tensor) -> Tensor:
    return torch.arange(float(len(ids)))


def test_every_epoch_visits_every_row_once_in_a_new_order(make, visits) -> None:
    iterate(make(reward=number_rows, epochs=4, mini_batches=2, missing_eos_penalty=0.0), 2)
    assert [len(rows) for rows in visits] == [3] * 16
    orders = [visits[i] + visits[i + 1] for i in range(0, 16, 2)]
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert len({tuple(order) for order in orders}) == 8


def test_fewer_prompts_than_mini_batches(make, visits) -> None:
    """A short last batch, or a small data set, gives mini-batches of one row, none empty."""
    trainer = make(reward=number_rows, mini_batches=4, missing_eos_penalty=0.0)
    trainer.train_rlhf(trainer.generate_experience(PROMPTS[:2]))
    assert sorted(visits) == [[0], [1]]


def test_adaptive_kl_follows_the_batch(make) -> None:
    trainer = make(kl_target=6.0, kl_horizon=100, kl_coef=0.2)
    with torch.no_grad():
        for parameter in trainer.engine.actor.parameters():
            parameter.mul_(1.1)
    experience = trainer.generate_experience(PROMPTS)
    kl = float((experience.old_logprobs - experience.ref_logprobs).sum(1).mean())
    assert trainer.metrics["objective/kl"] == pytest.approx(kl)
    assert trainer.metrics["objective/kl_coef"] == 0.2
    trainer.train_rlhf(experience)
    error = min(max(kl / 6.0 - 1, -0.2), 0.2)
    assert trainer.kl.coef == pytest.approx(0.2 * (1 + error * len(PROMPTS) / 100))
    expected = trainer.kl.coef
    trainer.generate_experience(PROMPTS)
    assert trainer.metrics["objective/kl_coef"] == expected


def test_learning_rate_falls_over_the_run(make) -> None:
    trainer = make(iterations=3, epochs=2, mini_batches=2)
    for step in (3, 7, 11):  # the last optimizer step of each iteration, of twelve in all
        iterate(trainer)
        height = (1 + math.cos(math.pi * step / 12)) / 2
        assert trainer.metrics["lr"] == pytest.approx(1e-3 * (0.1 + 0.9 * height))


METRICS = {
    "objective/kl", "objective/entropy", "objective/non_score_reward", "objective/rlhf_reward",
    "objective/scores", "policy/approxkl_avg", "policy/clipfrac_avg", "policy/entropy_avg",
    "loss/policy_avg", "loss/value_avg", "val/clipfrac_avg", "val/ratio", "val/ratio_var",
    "val/num_eos_tokens", "lr", "episode", "sampling/logp_difference/mean",
    "sampling/logp_difference/max", "timing_s/rollout", "timing_s/score", "timing_s/update_actor",
    "timing_s/update_critic", "timing_s/step", "perf/rollout_tokens_per_s", "perf/tokens_per_s",
}  # fmt: skip


def test_metrics_have_the_names_that_users_know(make) -> None:
    trainer = make()
    experience = trainer.generate_experience(PROMPTS)
    trainer.train_rlhf(experience)
    metrics = trainer.metrics
    assert set(metrics) >= METRICS
    assert all(value == value for value in metrics.values())  # none is NaN
    assert metrics["episode"] == 6
    assert metrics["val/num_eos_tokens"] == int(experience.ended.sum())
    assert metrics["objective/scores"] == pytest.approx(float(experience.scores.mean()))
    reward = metrics["objective/scores"] + metrics["objective/non_score_reward"]
    assert metrics["objective/rlhf_reward"] == pytest.approx(reward, abs=1e-6)  # fp32, cancelled
    laps = ("rollout", "score", "update_actor", "update_critic")
    total = sum(metrics[f"timing_s/{lap}"] for lap in laps)
    assert metrics["timing_s/step"] == pytest.approx(total)
    tokens = int(experience.response_lengths.sum())
    rate = metrics["perf/rollout_tokens_per_s"]
    assert rate == pytest.approx(tokens / metrics["timing_s/rollout"])


def test_entropy_is_that_of_the_policy(make) -> None:
    trainer = make()
    experience = trainer.generate_experience(PROMPTS)
    reference = trainer.engine.reference
    total = 0.0
    for i, prompt in enumerate(PROMPTS):
        ids = experience.input_ids[i : i + 1, : int(experience.lengths[i])]
        rows = reference(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        total -= float((rows.exp() * rows).sum())
    trainer.train_rlhf(experience)
    mean = total / int(experience.response_lengths.sum())
    assert trainer.metrics["policy/entropy_avg"] == pytest.approx(mean, rel=1e-4)


def test_the_engine_sees_every_update(make) -> None:
    """Rollout log-probs stay the training forward's, iteration after iteration."""
    trainer = make(epochs=2)
    for _ in range(3):
        iterate(trainer)
        assert trainer.metrics["sampling/logp_difference/max"] < 1e-5


def test_ppo_raises_the_reward(make) -> None:
    """Reward: the share of tokens from one half of the vocabulary, about 0.5 by chance."""

    def share(ids: Tensor, prompt_lengths: Tensor, lengths: Tensor) -> Tensor:
        columns = torch.arange(ids.shape[1])
        inside = (columns >= prompt_lengths[:, None]) & (columns < lengths[:, None])
        return ((ids % 2 == 0) & inside).sum(1) / inside.sum(1)

    trainer = make(
        reward=share, iterations=30, epochs=2, missing_eos_penalty=0.0, kl_coef=0.0,
        actor_optimizer=OptimizerConfig(learning_rate=1e-2),
        critic_optimizer=OptimizerConfig(learning_rate=1e-2),
    )  # fmt: skip
    scores = []
    for _ in range(30):
        trainer.train_rlhf(trainer.generate_experience(PROMPTS * 4))
        scores.append(trainer.metrics["objective/scores"])
    assert sum(scores[-5:]) / 5 > sum(scores[:3]) / 3 + 0.3


def test_trainers_agree_on_a_copy(make) -> None:
    """`train_rlhf` reads the experience and does not write into it."""
    trainer = make(epochs=2, mini_batches=2)
    experience = trainer.generate_experience(PROMPTS)
    before = copy.deepcopy(experience)
    trainer.train_rlhf(experience)
    for name, tensor in vars(before).items():
        assert torch.equal(getattr(experience, name), tensor), name
