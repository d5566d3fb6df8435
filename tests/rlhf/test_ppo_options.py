"""Each option of the update, by its gradient: against the formulas on each row alone."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from rlhf.config import OptimizerConfig, PPOConfig
from rlhf.experience import Experience
from rlhf.losses import policy_loss, truncated_importance
from rlhf.models import MovingAverage, load_causal_lm, save_model
from rlhf.trainers import PPOTrainer, RLHFEngine

PROMPTS = [[1, 50, 60], [1], [1, *range(70, 82)], [1, 90, 91, 92, 93], [1, 33], [1, 44, 45]]
STOPS = [2, *range(100, 130)]
OPTIMIZER = OptimizerConfig(learning_rate=1e-3, warmup_fraction=0.0, max_grad_norm=1e9)


@pytest.fixture
def make(causal_lm, scorer, tokenizer):
    def make(*, mixture: Dataset | None = None, dtype: Any = None, **options: Any) -> PPOTrainer:
        actor = causal_lm().to(dtype)
        actor.generation_config.eos_token_id = STOPS
        critic = None if "algorithm" in options else scorer(seed=1)
        engine = RLHFEngine(actor, critic, scorer(seed=2), tokenizer)
        options = {
            "max_new_tokens": 12, "batch_size": len(PROMPTS), "iterations": 10, "kl_coef": 0.3,
            "micro_batch_size": 4, "actor_optimizer": OPTIMIZER, "critic_optimizer": OPTIMIZER,
            **options,
        }  # fmt: skip
        return PPOTrainer(engine, PPOConfig(**options), seed=3, mixture=mixture)

    return make


def disturb(trainer: PPOTrainer, factor: float = 1.2) -> None:
    """Away from the rollout's policy, so that clips hold and ratios are not 1."""
    with torch.no_grad():
        for parameter in trainer.engine.actor.parameters():
            parameter.mul_(factor)


def plain_loss(trainer: PPOTrainer, experience: Experience) -> Tensor:
    """The actor's loss by its formulas, one token after another."""
    cfg = trainer.config
    rows, tokens = [], 0
    for i in range(len(experience)):
        prompt, length = int(experience.prompt_lengths[i]), int(experience.response_lengths[i])
        ids = experience.input_ids[i : i + 1, : prompt + length]
        logits = trainer.engine.actor(input_ids=ids).logits[0, prompt - 1 : -1]
        log_softmax = (logits / cfg.temperature).log_softmax(-1)
        losses = []
        for t in range(length):
            logprob = log_softmax[t, ids[0, prompt + t]]
            old, sampled, ref, advantage = (
                float(getattr(experience, name)[i, t])
                for name in ("old_logprobs", "sampling_logprobs", "ref_logprobs", "advantages")
            )
            ratio = (logprob - old).exp()
            clipped = ratio.clamp(1 - cfg.cliprange, 1 + cfg.cliprange)
            loss = torch.maximum(-advantage * ratio, -advantage * clipped)
            if cfg.dual_clip and advantage < 0:
                loss = loss.clamp(max=-advantage * cfg.dual_clip)
            if cfg.importance_cap:
                loss = loss * min(math.exp(old - sampled), cfg.importance_cap)
            if trainer.algorithm.kl_in_loss:
                d = logprob - ref
                k = d**2 / 2 if cfg.kl_estimator == "k2" else (-d).exp() - 1 + d
                loss = loss + cfg.kl_coef * k
            entropy = -(log_softmax[t].exp() * log_softmax[t]).sum()
            losses.append(loss - cfg.entropy_coef * entropy)
        rows.append(torch.stack(losses))
        tokens += length
    return {
        "token": torch.cat(rows).sum() / tokens,
        "sequence": torch.stack([row.mean() for row in rows]).mean(),
        "constant": torch.cat(rows).sum() / (len(rows) * cfg.max_new_tokens),
    }[trainer.algorithm.aggregation]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dual_clip": {"dual_clip": 1.05},
    "entropy": {"entropy_coef": 0.7},
    "k2_loss": {"kl_place": "loss", "kl_estimator": "k2"},
    "k3_loss": {"kl_place": "loss"},
    "sequence": {"aggregation": "sequence"},
    "constant": {"aggregation": "constant"},
    "importance": {
        "old_logprobs": "recompute", "importance_cap": 0.8, "top_k": 40, "temperature": 0.8
    },
    "grpo": {"algorithm": "grpo", "samples_per_prompt": 2, "temperature": 0.7},
    "dr_grpo": {"algorithm": "dr_grpo", "samples_per_prompt": 2, "entropy_coef": 0.1},
    "rloo": {"algorithm": "rloo", "samples_per_prompt": 2, "dual_clip": 3.0},
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_the_gradient_is_that_of_the_formulas(make, name: str) -> None:
    trainer = make(**OPTIONS[name])
    disturb(trainer, 1.05)
    experience = trainer.generate_experience(PROMPTS)
    disturb(trainer)
    parameters = list(trainer.engine.actor.parameters())
    gradients = torch.autograd.grad(plain_loss(trainer, experience), parameters)
    expected = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    trainer.train_rlhf(experience)
    found = trainer.metrics["policy/grad_norm"]
    assert found == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize(
    "name", [name for name, o in OPTIONS.items() if o and "algorithm" not in o]
)
def test_each_option_changes_the_gradient(make, name: str) -> None:
    """Else the test above would pass without it."""
    norms = []
    for options in (OPTIONS["plain"], OPTIONS[name]):
        trainer = make(**options)
        disturb(trainer, 1.05)
        experience = trainer.generate_experience(PROMPTS)
        disturb(trainer)
        trainer.train_rlhf(experience)
        norms.append(trainer.metrics["policy/grad_norm"])
    assert norms[1] != pytest.approx(norms[0], rel=1e-3)


def test_dual_clip_by_hand() -> None:
    """Ratio 5 at advantage -1 costs 3 and has no gradient; positive advantages are left alone."""
    logprobs = torch.tensor([[5.0, 2.0, 5.0]]).log().requires_grad_()
    mask = torch.ones(1, 3, dtype=torch.bool)
    advantages = torch.tensor([[-1.0, -1.0, 1.0]])
    found = policy_loss(logprobs, torch.zeros(1, 3), advantages, mask, cliprange=0.2, dual_clip=3.0)
    assert float(found.loss.detach()) == pytest.approx(3.0 + 2.0 - 1.2)
    found.loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0, 2.0, 0.0]]))


def test_importance_weights_undo_the_sampling_distribution() -> None:
    """Under them the mean over samples of a truncated policy is that of the whole one."""
    policy = torch.tensor([0.4, 0.3, 0.2, 0.1])
    sampled = torch.tensor([0.5, 0.3, 0.15, 0.05])
    value = torch.tensor([1.0, -2.0, 3.0, 5.0])
    weights = truncated_importance(policy.log(), sampled.log(), cap=10.0)
    torch.testing.assert_close((sampled * weights * value).sum(), (policy * value).sum())
    assert truncated_importance(policy.log(), sampled.log(), cap=1.5).max() == 1.5


def test_truncated_sampling_keeps_both_logprobs(make) -> None:
    """The policy's are of the whole distribution; those sampled under are larger."""
    trainer = make(top_k=5)
    experience = trainer.generate_experience(PROMPTS)
    mask = experience.response_mask
    assert (experience.sampling_logprobs > experience.old_logprobs)[mask].all()
    for i, prompt in enumerate(PROMPTS):
        ids = experience.input_ids[i : i + 1, : int(experience.lengths[i])]
        logits = trainer.engine.actor(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        chosen = ids[0, len(prompt) :, None]
        whole = logits.log_softmax(-1).gather(1, chosen)[:, 0]
        top = logits.topk(5).values.logsumexp(-1)
        length = len(chosen)
        torch.testing.assert_close(experience.old_logprobs[i, :length], whole)
        within = logits.gather(1, chosen)[:, 0] - top
        torch.testing.assert_close(experience.sampling_logprobs[i, :length], within)
    trainer.train_rlhf(experience)
    assert trainer.metrics["val/ratio"] == pytest.approx(1.0, abs=1e-5)


def test_whole_sampling_has_one_logprob(make) -> None:
    experience = make().generate_experience(PROMPTS)
    assert torch.equal(experience.sampling_logprobs, experience.old_logprobs)


def test_whitened_rewards_keep_their_mean(make) -> None:
    plain = make(kl_coef=0.5).generate_experience(PROMPTS)
    white = make(kl_coef=0.5, whiten_rewards=True).generate_experience(PROMPTS)
    mask = plain.response_mask
    torch.testing.assert_close(white.rewards[mask].mean(), plain.rewards[mask].mean())
    torch.testing.assert_close(white.rewards[mask].std(), torch.tensor(1.0))
    assert (white.rewards[~mask] == 0).all()


@pytest.fixture
def demonstrations() -> Dataset:
    rows = [[1, 40, 41, 42, 2], [1, 50, 2], [1, 60, 61, 62, 63, 64, 2]]
    masks = [[0] * 2 + [1] * (len(row) - 2) for row in rows]
    return Dataset.from_dict({"input_ids": rows * 2, "loss_mask": masks * 2})


def test_mixture_adds_the_language_models_gradient(make, demonstrations) -> None:
    """ptx_coef * mean loss per trained token of as many rows as the mini-batch has."""
    trainer = make(ptx_coef=2.0, mixture=demonstrations, kl_coef=0.0)
    experience = trainer.generate_experience(PROMPTS)
    loss, tokens = torch.tensor(0.0), 0
    for ids, mask in zip(demonstrations["input_ids"], demonstrations["loss_mask"], strict=True):
        rows = trainer.engine.actor(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        for t in range(1, len(ids)):
            if mask[t]:
                loss, tokens = loss - rows[t - 1, ids[t]], tokens + 1
    total = plain_loss(trainer, experience) + 2.0 * loss / tokens
    gradients = torch.autograd.grad(total, list(trainer.engine.actor.parameters()))
    expected = torch.cat([gradient.flatten() for gradient in gradients]).norm()
    trainer.train_rlhf(experience)
    assert trainer.metrics["loss/ptx_avg"] == pytest.approx(float(loss.detach()) / tokens, rel=1e-5)
    assert trainer.metrics["policy/grad_norm"] == pytest.approx(float(expected), rel=1e-4)


def test_a_mixture_needs_rows(make) -> None:
    with pytest.raises(ValueError, match="give PPOTrainer a mixture"):
        make(ptx_coef=1.0)


def test_moving_average_is_the_loop(make) -> None:
    trainer = make(ema_decay=0.9, epochs=2, mini_batches=2)
    name, weight = next(iter(trainer.engine.actor.named_parameters()))
    seen = []
    update = trainer.average.update
    trainer.average.update = lambda: (seen.append(weight.detach().clone()), update())
    expected = weight.detach().clone()
    trainer.train_rlhf(trainer.generate_experience(PROMPTS))
    assert len(seen) == 4
    for value in seen:
        expected = 0.9 * expected + 0.1 * value
    torch.testing.assert_close(trainer.average.weights()[name], expected)


def test_moving_average_moves_where_16_bits_would_not() -> None:
    """477 updates toward a weight 1 % away, at decay 0.992: 98 % of the way."""
    model = torch.nn.Linear(1, 1, bias=False).to(torch.float16)
    model.weight.data.fill_(1.0)
    average = MovingAverage(model, decay=0.992)
    half = model.weight.detach().clone()
    model.weight.data.fill_(1.01)
    for _ in range(477):
        average.update()
        half = (0.992 * half + 0.008 * model.weight.detach()).to(torch.float16)
    target = float(model.weight.detach())
    moved = (float(average.weights()["weight"]) - 1) / (target - 1)
    assert moved == pytest.approx(1 - 0.992**477, abs=1e-3)
    assert average.weights()["weight"].dtype == torch.float32
    assert (float(half) - 1) / (target - 1) < 0.1


def test_moving_average_is_saved_as_a_model(make, tokenizer, tmp_path) -> None:
    trainer = make(ema_decay=0.5)
    trainer.train_rlhf(trainer.generate_experience(PROMPTS))
    actor = trainer.engine.actor
    own = {name: p.detach().clone() for name, p in actor.named_parameters()}
    averages = trainer.average.weights()
    weights = trainer.actor.weights() | averages
    save_model(actor, tokenizer, tmp_path / "ema", weights=weights)
    saved = load_causal_lm(str(tmp_path / "ema"), tokenizer, dtype=torch.float32)
    for name, parameter in saved.named_parameters():
        torch.testing.assert_close(parameter.data, averages[name])
    assert all(torch.equal(p, own[name]) for name, p in actor.named_parameters())
    assert not torch.equal(saved.get_input_embeddings().weight, own["model.embed_tokens.weight"])


def test_a_kl_explosion_stops_the_run(make) -> None:
    trainer = make(kl_limit=0.5)
    trainer.generate_experience(PROMPTS)
    disturb(trainer, 3.0)
    with pytest.raises(ValueError, match=r"nats per token in iteration 1, over kl_limit=0\.5"):
        trainer.generate_experience(PROMPTS)


def test_bf16_weights_move_by_small_steps(make) -> None:
    """Masters in fp32: at a learning rate of 1e-5 bf16 weights alone would stand still."""
    small = OptimizerConfig(learning_rate=1e-5, warmup_fraction=0.0, schedule="constant")
    trainer = make(dtype=torch.bfloat16, actor_optimizer=small, iterations=100, epochs=40)
    before = [p.detach().clone() for p in trainer.engine.actor.parameters()]
    trainer.train_rlhf(trainer.generate_experience(PROMPTS))
    after = trainer.engine.actor.parameters()
    moved = [float((a != b).float().mean()) for a, b in zip(after, before, strict=True)]
    assert max(moved) > 0.05
