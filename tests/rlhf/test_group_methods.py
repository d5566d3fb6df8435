"""GRPO, Dr. GRPO, RLOO, REINFORCE++: against loops, and through the trainer without a critic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.advantages import dr_grpo, group_statistics, grpo, reinforce_pp, rloo
from rlhf.config import OptimizerConfig, PPOConfig
from rlhf.losses import aggregation_weights
from rlhf.rewards import Reward
from rlhf.trainers import PPOTrainer, RLHFEngine

PROMPTS = [[1, 50, 60], [1], [1, *range(70, 82)]]
STOPS = [2, *range(100, 130)]
GROUPS = [0, 0, 0, 1, 1, 7, 3, 3]  # unequal sizes, one alone: skipped responses leave such
LENGTHS = [3, 1, 2, 4, 4, 2, 1, 3]
METHODS = {"grpo": grpo, "dr_grpo": dr_grpo, "rloo": rloo, "reinforce_pp": reinforce_pp}


def loop(method: str, totals: list[float]) -> Tensor:
    """Each response by its group's own statistics, then spread over its tokens."""
    found = torch.zeros(len(totals), max(LENGTHS))
    for i, total in enumerate(totals):
        group = torch.tensor([t for t, g in zip(totals, GROUPS, strict=True) if g == GROUPS[i]])
        if method == "rloo":
            others = (group.sum() - total) / (len(group) - 1) if len(group) > 1 else total
            advantage = total - others
        else:
            advantage = total - group.mean()
        if method == "grpo":
            advantage = advantage / ((group.std() if len(group) > 1 else 0.0) + 1e-4)
        found[i, : LENGTHS[i]] = advantage
    if method == "reinforce_pp":
        tokens = torch.cat([found[i, :n] for i, n in enumerate(LENGTHS)])
        for i, n in enumerate(LENGTHS):
            found[i, :n] = (found[i, :n] - tokens.mean()) / tokens.std()
    return found


@pytest.mark.parametrize("method", METHODS)
def test_advantages_are_the_loop(method: str) -> None:
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    rewards = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0)) * mask
    totals = [float(row.sum()) for row in rewards]
    found = METHODS[method](rewards, mask, torch.tensor(GROUPS))
    torch.testing.assert_close(found, loop(method, totals), rtol=1e-4, atol=1e-5)


def test_advantages_by_hand() -> None:
    """Scores 1, 0, 0, 1 and 2, 2 in two groups of one-token responses."""
    rewards = torch.tensor([[1.0], [0.0], [0.0], [1.0], [2.0], [2.0]])
    mask, groups = torch.ones(6, 1, dtype=torch.bool), torch.tensor([0, 0, 0, 0, 1, 1])
    centred = torch.tensor([[0.5], [-0.5], [-0.5], [0.5], [0.0], [0.0]])
    assert torch.equal(dr_grpo(rewards, mask, groups), centred)
    torch.testing.assert_close(rloo(rewards, mask, groups), centred * 4 / 3)
    torch.testing.assert_close(grpo(rewards, mask, groups), centred / (3**-0.5 + 1e-4))


def test_groups_are_found_by_number_and_not_by_place() -> None:
    x, groups = torch.tensor([1.0, 5.0, 3.0, 7.0]), torch.tensor([4, 9, 4, 9])
    size, mean, std = group_statistics(x, groups)
    assert size.tolist() == [2.0] * 4
    assert mean.tolist() == [2.0, 6.0, 2.0, 6.0]
    torch.testing.assert_close(std, torch.full((4,), 2**0.5))


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
def test_aggregation_is_the_loop_over_micro_batches(how: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor(LENGTHS)
    mask = torch.arange(4) < lengths[:, None]
    losses = torch.randn(8, 4, generator=generator)
    rows = [losses[i, :n] for i, n in enumerate(LENGTHS)]
    expected = {
        "token": torch.cat(rows).mean(),
        "sequence": torch.stack([row.mean() for row in rows]).mean(),
        "constant": torch.cat(rows).sum() / (8 * 16),
    }[how]
    total = torch.tensor(0.0)
    for part in (slice(0, 1), slice(1, 6), slice(6, 8)):
        weights = aggregation_weights(
            how, lengths[part], tokens=sum(LENGTHS), sequences=8, max_length=16
        )
        total += (losses[part] * mask[part] * weights).sum()
    torch.testing.assert_close(total, expected)


@pytest.fixture
def make(causal_lm, tokenizer):
    def make(reward: Any, *, advantage: Any = None, **options: Any) -> PPOTrainer:
        actor = causal_lm()
        actor.generation_config.eos_token_id = STOPS
        reward = reward if isinstance(reward, Reward) else Reward([reward])
        optimizer = OptimizerConfig(learning_rate=1e-3, warmup_fraction=0.0)
        options = {
            "algorithm": "grpo", "samples_per_prompt": 4, "max_new_tokens": 8,
            "batch_size": len(PROMPTS), "missing_eos_penalty": 0.0, "actor_optimizer": optimizer,
            **options,
        }  # fmt: skip
        engine = RLHFEngine(actor, None, reward, tokenizer)
        return PPOTrainer(engine, PPOConfig(**options), seed=3, advantage=advantage)

    return make


def evenness(prompts: list[Any], completions: list[str], **columns: Any) -> list[float]:
    return [sum(c in "aeiou" for c in text) / max(1, len(text)) for text in completions]


@pytest.mark.parametrize("algorithm", METHODS)
def test_an_iteration_of_each_method(make, algorithm: str) -> None:
    """No critic; ratio 1 on the first mini-batch; the KL where the method has it."""
    trainer = make(evenness, algorithm=algorithm, kl_coef=0.1)
    experience = trainer.generate_experience(PROMPTS)
    assert experience.groups.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for i, prompt in enumerate(PROMPTS):
        for row in experience.input_ids[4 * i : 4 * i + 4]:
            assert row[: len(prompt)].tolist() == prompt
    assert len({tuple(row) for row in experience.input_ids.tolist()}) > len(PROMPTS)
    expected = METHODS[algorithm](experience.rewards, experience.response_mask, experience.groups)
    assert torch.equal(experience.advantages, expected)
    before = [p.clone() for p in trainer.engine.actor.parameters()]
    trainer.train_rlhf(experience)
    metrics = trainer.metrics
    assert metrics["val/ratio"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["sampling/logp_difference/max"] < 1e-5
    assert not any(name.startswith("value/") for name in metrics)
    after = trainer.engine.actor.parameters()
    assert not all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize(("algorithm", "in_loss"), [("grpo", True), ("rloo", False)])
def test_where_the_kl_goes(make, algorithm: str, in_loss: bool) -> None:
    """Off the reference, RLOO's rewards are charged for it and GRPO's are the scores alone."""
    trainer = make(evenness, algorithm=algorithm, kl_coef=0.5)
    with torch.no_grad():
        for parameter in trainer.engine.actor.parameters():
            parameter.mul_(1.1)
    experience = trainer.generate_experience(PROMPTS)
    kl = (experience.old_logprobs - experience.ref_logprobs).sum(1)
    assert kl.abs().min() > 1e-3
    charged = experience.scores if in_loss else experience.scores - 0.5 * kl
    torch.testing.assert_close(experience.rewards.sum(1), charged)


def test_groups_of_equal_scores_are_counted_and_teach_nothing(make) -> None:
    def by_prompt(prompts, completions, **columns):
        return [float(len(p)) if len(p) < 3 else float(len(c)) for p, c in
                zip(prompts, completions, strict=True)]  # fmt: skip

    trainer = make(by_prompt, kl_coef=0.0)
    texts = ["a", "bb", "a longer one"]
    experience = trainer.generate_experience(PROMPTS, {"prompt": texts})
    assert trainer.metrics["val/zero_std_groups"] == 2
    assert (experience.advantages[:8] == 0).all()
    assert (experience.advantages[8:] != 0).any()


def test_skipped_responses_are_left_out_and_counted(make) -> None:
    def picky(prompts, completions, keep, **columns):
        return [float(len(c)) if k else None for c, k in zip(completions, keep, strict=True)]

    trainer = make(picky)
    experience = trainer.generate_experience(PROMPTS, {"keep": [True, False, True]})
    assert trainer.metrics["val/skipped"] == 4
    assert experience.groups.tolist() == [0] * 4 + [2] * 4
    assert not experience.scores.isnan().any()
    trainer.train_rlhf(experience)
    with pytest.raises(ValueError, match="skipped all 12 responses"):
        trainer.generate_experience(PROMPTS, {"keep": [False] * 3})


def test_empty_completions_are_scored_like_any(make) -> None:
    """A response that is the stop token alone: text "", one token with a gradient."""
    seen: list[str] = []

    def watch(prompts, completions, **columns):
        seen.extend(completions)
        return [float(len(c)) for c in completions]

    trainer = make(watch)
    actor = trainer.engine.actor
    with torch.no_grad():  # after the prompt [1], EOS is certain
        hidden = actor.base_model(input_ids=torch.tensor([PROMPTS[1]])).last_hidden_state[0, -1]
        actor.lm_head.weight[2] = 100 * hidden / hidden.square().sum()
    experience = trainer.generate_experience(PROMPTS)
    assert (experience.response_lengths[4:8] == 1).all()
    assert seen.count("") >= 4
    assert experience.scores[4:8].tolist() == [0.0] * 4
    assert all(loss == loss for loss in trainer.train_rlhf(experience))


def test_an_advantage_of_ones_own(make) -> None:
    def signs(rewards: Tensor, mask: Tensor, groups: Tensor) -> Tensor:
        return rewards.sum(1, keepdim=True).sign() * mask

    trainer = make(lambda prompts, completions: [1.0] * len(prompts), advantage=signs)
    experience = trainer.generate_experience(PROMPTS)
    assert torch.equal(experience.advantages, experience.response_mask.float())


def test_ppo_may_sample_several_responses_too(make, scorer) -> None:
    trainer = make(evenness)
    engine = RLHFEngine(
        trainer.engine.actor, scorer(), trainer.engine.reward, trainer.engine.tokenizer
    )
    config = PPOConfig(samples_per_prompt=2, batch_size=3, max_new_tokens=8)
    ppo = PPOTrainer(engine, config)
    ppo.train_rlhf(ppo.generate_experience(PROMPTS))
    assert ppo.metrics["episode"] == 6
    with pytest.raises(ValueError, match="ppo needs a critic"):
        PPOTrainer(trainer.engine, config)


def test_columns_have_an_entry_for_each_prompt(make) -> None:
    with pytest.raises(ValueError, match="column answer has 2 entries for 3 prompts"):
        make(evenness).generate_experience(PROMPTS, {"answer": ["a", "b"]})


INVALID = {
    "one sample": ({"algorithm": "rloo"}, "samples_per_prompt must be 2 or more, got 1"),
    "critic": (
        {"algorithm": "grpo", "samples_per_prompt": 2, "critic_warmup": 1},
        "critic_warmup is for ppo; grpo has no critic",
    ),
    "whitening": (
        {"algorithm": "grpo", "samples_per_prompt": 2, "whiten_rewards": True},
        "whiten_rewards is for ppo",
    ),
    "k1 loss": ({"kl_place": "loss", "kl_estimator": "k1"}, "k1 as a loss"),
    "dual clip": ({"dual_clip": 0.9}, "dual_clip must be above 1"),
    "importance": ({"importance_cap": 2.0}, "set old_logprobs to recompute"),
    "top_p": ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
    "ema": ({"ema_decay": 1.0}, r"ema_decay must be in \(0, 1\)"),
    "weights": ({"reward_weights": [1.0]}, "1 reward_weights for 0 reward_functions"),
    "entropy": ({"entropy_coef": -0.1}, "entropy_coef must be 0 or more"),
}  # fmt: skip


@pytest.mark.parametrize("name", INVALID)
def test_options_that_contradict_each_other(name: str) -> None:
    options, message = INVALID[name]
    with pytest.raises(ValueError, match=message):
        PPOConfig(**options)
