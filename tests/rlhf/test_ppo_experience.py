"""What a rollout leaves behind, against a loop over its sequences with plain HF forwards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf.config import PPOConfig
from rlhf.experience import Experience
from rlhf.trainers import PPOTrainer, RLHFEngine

PROMPTS = [[1, 50, 60], [1], [1, *range(70, 82)], [1, 90, 91, 92, 93], [1, 33], [1, 44, 45]]
STOPS = [2, *range(100, 130)]  # so that about one token in nine ends a response


def config(**options: Any) -> PPOConfig:
    return PPOConfig(**{"max_new_tokens": 12, "batch_size": len(PROMPTS), **options})


@pytest.fixture
def make(causal_lm, scorer, tokenizer):
    """A trainer on fresh models: the same each time."""

    def make(family: str = "llama", *, reward: Any = None, model: Any = None, **options: Any):
        actor = causal_lm(family, **(model or {}))
        actor.generation_config.eos_token_id = STOPS
        reward = reward or scorer(family, seed=2)
        engine = RLHFEngine(actor, scorer(family, seed=1, **(model or {})), reward, tokenizer)
        return PPOTrainer(engine, config(**options), seed=3)

    return make


def plain_logprobs(model: nn.Module, ids: list[int], prompt: int, temperature: float) -> Tensor:
    logits = model(input_ids=torch.tensor([ids])).logits[0, prompt - 1 : -1] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(ids[prompt:])[:, None]).squeeze(1)


@torch.no_grad()
def loop(trainer: PPOTrainer, experience: Experience, reward: nn.Module, i: int) -> dict[str, Any]:
    """One row of an experience, from its tokens alone."""
    cfg, engine = trainer.config, trainer.engine
    prompt = len(PROMPTS[i])
    ids = experience.input_ids[i, : int(experience.lengths[i])].tolist()
    ended = ids[-1] in STOPS
    critic = engine.critic.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
    values = engine.critic.score(critic[prompt - 1 : -1]).squeeze(-1)
    eos = engine.tokenizer.eos_token_id  # where the reward model has learned to score
    read = ids if ids[-1] == eos else [*ids, eos]
    score = reward(input_ids=torch.tensor([read])).logits[0, 0]
    score = score if ended else score - cfg.missing_eos_penalty
    old = plain_logprobs(engine.actor, ids, prompt, cfg.temperature)
    ref = plain_logprobs(engine.reference, ids, prompt, cfg.temperature)
    rewards = -cfg.kl_coef * (old - ref)
    rewards[-1] += score.clamp(-cfg.reward_clip, cfg.reward_clip)
    advantages, following = torch.zeros_like(values), 0.0
    for t in reversed(range(len(values))):
        after = values[t + 1] if t + 1 < len(values) else 0.0
        following = rewards[t] + cfg.gamma * after - values[t] + cfg.gamma * cfg.lam * following
        advantages[t] = following
    return {
        "ended": ended, "scores": score, "old_logprobs": old, "ref_logprobs": ref,
        "values": values, "rewards": rewards, "returns": advantages + values,
        "unwhitened": advantages,
    }  # fmt: skip


OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "recompute": {"old_logprobs": "recompute"},
    "temperature": {"temperature": 0.6},
    "clip": {"reward_clip": 0.1, "missing_eos_penalty": 3.0},
    "discount": {"gamma": 0.9, "lam": 0.8, "kl_coef": 1.0},
    "micro": {"micro_batch_size": 4},
}


@pytest.mark.parametrize("family", ["llama", "opt"])
@pytest.mark.parametrize("name", OPTIONS)
def test_experience_is_the_loop(make, scorer, name: str, family: str) -> None:
    reward = scorer(family, seed=2)
    trainer = make(family, reward=reward, **OPTIONS[name])
    with torch.no_grad():  # else actor and reference agree, and the KL is not tested
        for parameter in trainer.engine.actor.parameters():
            parameter.mul_(1.05)
    experience = trainer.generate_experience(PROMPTS)
    assert len(set(experience.response_lengths.tolist())) > 1
    rows = [loop(trainer, experience, reward, i) for i in range(len(PROMPTS))]
    unwhitened = torch.cat([row.pop("unwhitened") for row in rows])
    for i, row in enumerate(rows):
        length = int(experience.response_lengths[i])
        assert bool(experience.ended[i]) == row.pop("ended")
        torch.testing.assert_close(experience.scores[i], row.pop("scores"))
        for field, expected in row.items():
            found = getattr(experience, field)[i]
            torch.testing.assert_close(found[:length], expected, msg=lambda m, f=field: f"{f}: {m}")
            assert (found[length:] == 0).all(), field
    white = (unwhitened - unwhitened.mean()) / unwhitened.std()
    mask = experience.response_mask
    torch.testing.assert_close(experience.advantages[mask], white, rtol=1e-4, atol=1e-5)
    assert (experience.advantages[~mask] == 0).all()


def test_tokens_are_prompt_and_response_right_padded(make, tokenizer) -> None:
    experience = make().generate_experience(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        row, length = experience.input_ids[i].tolist(), int(experience.lengths[i])
        assert row[: len(prompt)] == prompt
        assert row[length:] == [tokenizer.pad_token_id] * (len(row) - length)
        response = row[len(prompt) : length]
        assert not set(response[:-1]) & set(STOPS)  # cut at the first stop token
        assert bool(experience.ended[i]) == (response[-1] in STOPS)
        assert experience.ended[i] or len(response) == 12


def test_the_stop_token_is_part_of_the_response(make) -> None:
    """It has mask 1, a log-prob, and the reward; what follows it has none of them."""
    trainer = make(reward=lambda ids, prompts, lengths: torch.full((len(ids),), 4.0))
    experience = trainer.generate_experience(PROMPTS)
    row = experience.ended.int().argmax()
    last = int(experience.response_lengths[row]) - 1
    assert int(experience.input_ids[row, int(experience.lengths[row]) - 1]) in STOPS
    assert experience.response_mask[row, last]
    assert experience.old_logprobs[row, last] < 0
    assert float(experience.rewards[row, last]) == pytest.approx(4.0, abs=1e-4)
    assert not experience.response_mask[row, last + 1 :].any()
    assert (experience.rewards[row, last + 1 :] == 0).all()


def test_missing_eos_costs_the_penalty(make) -> None:
    trainer = make(
        reward=lambda ids, prompts, lengths: torch.full((len(ids),), 0.5), missing_eos_penalty=2.0
    )
    experience = trainer.generate_experience(PROMPTS)
    assert set(experience.ended.tolist()) == {True, False}
    assert torch.equal(experience.scores, torch.where(experience.ended, 0.5, -1.5))


def test_a_function_can_be_the_reward(make) -> None:
    """It is given what the reward model is given, in micro-batches."""

    def score(input_ids: Tensor, prompt_lengths: Tensor, lengths: Tensor) -> Tensor:
        assert len(input_ids) <= 4
        return 100.0 * prompt_lengths + lengths

    experience = make(reward=score, micro_batch_size=4, missing_eos_penalty=0.0)
    experience = experience.generate_experience(PROMPTS)
    prompts = torch.tensor([float(len(p)) for p in PROMPTS])
    assert torch.equal(experience.scores, 100 * prompts + experience.lengths)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_kl_is_exactly_0_at_the_start(make, family: str) -> None:
    """Actor and reference run the same kernels on the same weights, the engine's views or not."""
    trainer = make(family, old_logprobs="recompute", micro_batch_size=4)
    for _ in range(2):  # the second time the actor's weights are views of fused buffers
        experience = trainer.generate_experience(PROMPTS)
        assert torch.equal(experience.old_logprobs, experience.ref_logprobs)
        assert trainer.metrics["objective/kl"] == 0.0
        assert trainer.metrics["objective/non_score_reward"] == 0.0


@pytest.mark.parametrize("temperature", [1.0, 0.6], ids=["T1", "T0.6"])
def test_rollout_and_training_logprobs_agree(make, temperature: float) -> None:
    """The engine's log-probs are within 1e-5 nats of the training forward's, in fp32."""
    rollout = make(temperature=temperature).generate_experience(PROMPTS)
    training = make(temperature=temperature, old_logprobs="recompute").generate_experience(PROMPTS)
    assert torch.equal(rollout.input_ids, training.input_ids)
    difference = (rollout.old_logprobs - training.old_logprobs).abs()
    assert 0 < difference.max() < 1e-5


def test_dropout_is_off(make) -> None:
    """It would make old, new and reference log-probs differ by chance."""
    trainer = make("opt", model={"dropout": 0.5}, old_logprobs="recompute")
    experience = trainer.generate_experience(PROMPTS)
    assert torch.equal(experience.old_logprobs, experience.ref_logprobs)
    trainer.train_rlhf(experience)
    assert trainer.metrics["sampling/logp_difference/max"] < 1e-5


def test_one_token_responses(make) -> None:
    trainer = make(max_new_tokens=1)
    experience = trainer.generate_experience(PROMPTS)
    assert experience.rewards.shape == (len(PROMPTS), 1)
    expected = experience.rewards - experience.values
    torch.testing.assert_close(experience.returns, expected + experience.values)
    for loss in trainer.train_rlhf(experience):
        assert loss == loss


def test_rollouts_differ_between_iterations_and_seeds(make) -> None:
    trainer = make()
    first = trainer.generate_experience(PROMPTS)
    assert torch.equal(trainer.generate_experience(PROMPTS).input_ids, first.input_ids)
    trainer.train_rlhf(first)
    second = trainer.generate_experience(PROMPTS)
    assert second.input_ids.tolist() != first.input_ids.tolist()
    other = PPOTrainer(trainer.engine, trainer.config, seed=4).generate_experience(PROMPTS)
    assert other.input_ids.tolist() != first.input_ids.tolist()
