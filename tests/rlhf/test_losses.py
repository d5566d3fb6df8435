"""The losses against loops that a reader can check, and numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlhf.losses import dpo_loss, policy_loss, preference_loss, value_loss

SHAPES = pytest.mark.parametrize(
    "shape", [(1, 1), (3, 7), (8, 63)], ids=lambda s: f"B{s[0]}-T{s[1]}"
)


def random_mask(batch: int, width: int, generator: torch.Generator) -> Tensor:
    """Right-padded: True on at least one token a row, and on one whole row."""
    lengths = torch.randint(1, width + 1, (batch,), generator=generator)
    lengths[0] = width
    return torch.arange(width) < lengths[:, None]


def policy_inputs(shape: tuple[int, int], seed: int = 0) -> tuple[Tensor, ...]:
    """Log-probs, old log-probs, advantages, mask, with ratios on both sides of the clip."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(shape, generator=generator) * 3
    logprobs = old + 0.5 * torch.randn(shape, generator=generator)
    advantages = torch.randn(shape, generator=generator)
    return logprobs, old, advantages, random_mask(*shape, generator)


def policy_loop(
    logprobs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, cliprange: float
) -> dict[str, float]:
    sums = dict.fromkeys(("loss", "clipped", "approx_kl", "ratio", "ratio_square"), 0.0)
    for b, t in mask.nonzero().tolist():
        log_ratio = min(max(float(logprobs[b, t] - old[b, t]), -20.0), 20.0)
        ratio, advantage = math.exp(log_ratio), float(advantages[b, t])
        clipped = min(max(ratio, 1 - cliprange), 1 + cliprange)
        sums["loss"] += max(-advantage * ratio, -advantage * clipped)
        sums["clipped"] += -advantage * clipped > -advantage * ratio
        sums["approx_kl"] += 0.5 * log_ratio**2
        sums["ratio"] += ratio
        sums["ratio_square"] += ratio**2
    return sums


@SHAPES
def test_policy_loss_is_the_loop(shape: tuple[int, int]) -> None:
    inputs = policy_inputs(shape)
    found = policy_loss(*inputs, cliprange=0.2)
    for name, expected in policy_loop(*inputs, 0.2).items():
        torch.testing.assert_close(float(getattr(found, name)), expected, rtol=1e-5, atol=1e-6)


def test_policy_loss_by_hand() -> None:
    """Ratios 1.5, 0.5, 1.5, 0.5 at cliprange 0.2, advantages +1, +1, -1, -1."""
    logprobs = torch.tensor([[1.5, 0.5, 1.5, 0.5]]).log()
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    found = policy_loss(logprobs, torch.zeros(1, 4), advantages, mask, cliprange=0.2)
    # -1.2 (held), -0.5, 1.5, 0.8 (held)
    assert float(found.loss) == pytest.approx(-1.2 - 0.5 + 1.5 + 0.8)
    assert int(found.clipped) == 2
    assert float(found.ratio) == pytest.approx(4.0)
    assert float(found.ratio_square) == pytest.approx(5.0)


def test_policy_gradient_stops_where_the_clip_holds() -> None:
    logprobs = torch.tensor([[1.5, 0.5, 1.5, 0.5]]).log().requires_grad_()
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    policy_loss(logprobs, torch.zeros(1, 4), advantages, mask, cliprange=0.2).loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([[0.0, -0.5, 1.5, 0.0]]))


def test_log_ratio_is_clamped_to_20() -> None:
    """A token that became impossible, or certain, does not overflow the loss."""
    logprobs = torch.tensor([[-500.0, 0.0]])
    old = torch.tensor([[0.0, -500.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    found = policy_loss(logprobs, old, torch.tensor([[1.0, -1.0]]), mask, cliprange=0.2)
    assert float(found.loss) == pytest.approx(math.exp(20) - math.exp(-20), rel=1e-6)
    assert float(found.approx_kl) == pytest.approx(400.0)


def test_equal_policies_have_ratio_one() -> None:
    _, old, advantages, mask = policy_inputs((4, 9))
    found = policy_loss(old, old, advantages, mask, cliprange=0.2)
    assert float(found.ratio) == float(mask.sum())
    assert float(found.approx_kl) == 0
    assert int(found.clipped) == 0
    torch.testing.assert_close(found.loss, -(advantages * mask).sum())


@SHAPES
def test_value_loss_is_the_loop(shape: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(1)
    values, old, returns = (torch.randn(shape, generator=generator) for _ in range(3))
    mask = random_mask(*shape, generator)
    loss, held = 0.0, 0
    for b, t in mask.nonzero().tolist():
        v, o, r = (float(x[b, t]) for x in (values, old, returns))
        near = o + min(max(v - o, -0.2), 0.2)
        loss += 0.5 * max((v - r) ** 2, (near - r) ** 2)
        held += (near - r) ** 2 > (v - r) ** 2
    found = value_loss(values, old, returns, mask, cliprange_value=0.2)
    torch.testing.assert_close(float(found.loss), loss, rtol=1e-5, atol=1e-6)
    assert int(found.clipped) == held


def test_value_loss_by_hand() -> None:
    """From 0 toward a return of 1: the clip at 0.2 holds back the value 0.9, not the value 0.1."""
    values = torch.tensor([[0.9, 0.1]], requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    found = value_loss(values, torch.zeros(1, 2), torch.ones(1, 2), mask, cliprange_value=0.2)
    assert float(found.loss.detach()) == pytest.approx(0.5 * 0.8**2 + 0.5 * 0.9**2)
    assert int(found.clipped) == 1
    found.loss.backward()
    torch.testing.assert_close(values.grad, torch.tensor([[0.0, -0.9]]))


def test_rounding_is_not_clipped() -> None:
    """Inside the clip no value counts, though old + (value - old) has other last bits."""
    generator = torch.Generator().manual_seed(2)
    old, values = (0.2 * torch.rand(64, 63, generator=generator) for _ in range(2))
    returns, mask = torch.randn(old.shape, generator=generator), torch.ones_like(old).bool()
    assert (old + (values - old) != values).any()
    found = value_loss(values, old, returns, mask, cliprange_value=0.2)
    assert int(found.clipped) == 0
    assert float(found.loss) == float(0.5 * (values - returns).square().sum())


def test_value_loss_is_computed_in_fp32() -> None:
    values = torch.tensor([[1.0, 1.01]], dtype=torch.bfloat16)
    mask = torch.ones(1, 2, dtype=torch.bool)
    found = value_loss(values, values, torch.zeros(1, 2), mask, cliprange_value=0.2)
    assert found.loss.dtype == torch.float32
    assert float(found.loss) == 0.5 * float(values.float().square().sum())


def test_preference_loss_by_hand() -> None:
    chosen, rejected = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0])
    expected = math.log(1 + math.exp(-2)) + math.log(1 + math.exp(1))
    assert float(preference_loss(chosen, rejected)) == pytest.approx(expected)
    margin = torch.tensor([0.5, 0.25])
    expected = math.log(1 + math.exp(-1.5)) + math.log(1 + math.exp(1.25))
    assert float(preference_loss(chosen, rejected, margin)) == pytest.approx(expected)


def test_preference_loss_does_not_overflow() -> None:
    chosen = torch.tensor([-1e4, 1e4], requires_grad=True)
    loss = preference_loss(chosen, torch.zeros(2))
    assert float(loss.detach()) == 1e4
    loss.backward()
    torch.testing.assert_close(chosen.grad, torch.tensor([-1.0, 0.0]))


@pytest.mark.parametrize("garbage", [1e6, -1e6, 0.0])
def test_padding_changes_nothing(garbage: float) -> None:
    """More columns, whatever they hold, change neither a sum nor a gradient."""
    logprobs, old, advantages, mask = policy_inputs((4, 9))

    def run(width: int) -> tuple[Tensor, ...]:
        wide = [torch.full((4, width), garbage) for _ in range(3)]
        wide_mask = torch.zeros(4, width, dtype=torch.bool)
        wide_mask[:, :9] = mask
        for tensor, part in zip(wide, (logprobs, old, advantages), strict=True):
            tensor[:, :9] = torch.where(mask, part, tensor[:, :9])
        wide[0].requires_grad_()
        policy = policy_loss(*wide, wide_mask, cliprange=0.2)
        value = value_loss(wide[0], wide[1], wide[2], wide_mask, cliprange_value=0.2)
        (policy.loss + value.loss).backward()
        sums = [policy.loss, policy.clipped, policy.approx_kl, policy.ratio, policy.ratio_square]
        assert (wide[0].grad[~wide_mask] == 0).all()
        return *(s.detach() for s in (*sums, value.loss, value.clipped)), wide[0].grad[wide_mask]

    for found, expected in zip(run(30), run(9), strict=True):
        torch.testing.assert_close(found, expected)


def test_global_token_mean_over_micro_batches() -> None:
    """Sums over micro-batches over one count are the whole batch; a mean of means is not."""
    inputs = policy_inputs((6, 20))
    count = inputs[3].sum()

    def gradient(parts: list[slice], divide: str) -> Tensor:
        logprobs = inputs[0].clone().requires_grad_()
        for part in parts:
            rows = [x[part] for x in (logprobs, *inputs[1:])]
            loss = policy_loss(*rows, cliprange=0.2).loss
            tokens = count if divide == "global" else rows[3].sum() * len(parts)
            (loss / tokens).backward()
        return logprobs.grad

    whole, halves = [slice(0, 6)], [slice(0, 1), slice(1, 6)]
    torch.testing.assert_close(gradient(halves, "global"), gradient(whole, "global"))
    assert not torch.allclose(gradient(halves, "micro"), gradient(whole, "global"), rtol=0.05)


def plain_dpo(c, r, rc, rr, *, beta, kind, smoothing) -> float:
    total = 0.0
    for i in range(len(c)):
        h = (c[i] - rc[i]) - (r[i] - rr[i])
        if kind == "ipo":
            total += (h - 0.5 / beta) ** 2
        else:
            right, wrong = (math.log(1 / (1 + math.exp(-sign * beta * h))) for sign in (1, -1))
            total += -(1 - smoothing) * right - smoothing * wrong
    return total


@pytest.mark.parametrize(
    ("kind", "beta", "smoothing"),
    [("sigmoid", 0.1, 0.0), ("sigmoid", 0.5, 0.2), ("ipo", 0.1, 0.0)],
    ids=["sigmoid", "smoothed", "ipo"],
)
def test_dpo_loss_by_hand(kind: str, beta: float, smoothing: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logprobs = [-20 * torch.rand(5, generator=generator) for _ in range(4)]
    found = dpo_loss(*logprobs, beta=beta, kind=kind, label_smoothing=smoothing)
    plain = plain_dpo(*(x.tolist() for x in logprobs), beta=beta, kind=kind, smoothing=smoothing)
    assert float(found.loss) == pytest.approx(plain, rel=1e-5)
    torch.testing.assert_close(found.chosen_rewards, beta * (logprobs[0] - logprobs[2]))
    torch.testing.assert_close(found.rejected_rewards, beta * (logprobs[1] - logprobs[3]))


def test_dpo_of_the_reference_itself() -> None:
    """Every pair is a coin toss; IPO is as far from its aim as the aim is from 0."""
    x, y = torch.tensor([-3.0, -9.0]), torch.tensor([-5.0, -1.0])
    assert float(dpo_loss(x, y, x, y, beta=0.3).loss) == pytest.approx(2 * math.log(2))
    assert float(dpo_loss(x, y, x, y, beta=0.25, kind="ipo").loss) == pytest.approx(2 * 4.0)


def test_dpo_of_extreme_pairs_stays_finite() -> None:
    far = torch.tensor([-1e4, 0.0], requires_grad=True)
    loss = dpo_loss(far, far.flip(0), torch.zeros(2), torch.zeros(2), beta=1.0).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(far.grad).all()


def test_margin_and_centring_by_hand() -> None:
    chosen, rejected, margin = (
        torch.tensor([2.0, 1]),
        torch.tensor([1.0, 3]),
        torch.tensor([0.5, 0]),
    )
    expected = math.log(1 + math.exp(-0.5)) + math.log(1 + math.exp(2.0))
    assert float(preference_loss(chosen, rejected, margin)) == pytest.approx(expected, rel=1e-6)
    centred = preference_loss(chosen, rejected, margin, centring_coef=0.1)
    assert float(centred) == pytest.approx(expected + 0.1 * (3**2 + 4**2), rel=1e-6)
