"""Shaped rewards, generalised advantages and whitening against loops and hand-checked numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlhf.advantages import gae, masked_mean, shape_rewards, whiten


def response_mask(lengths: list[int], width: int) -> Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def gae_loop(
    rewards: Tensor, values: Tensor, lengths: list[int], gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Each row alone, from its last token backwards, as in arXiv 1506.02438, eq. 16."""
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    for b, length in enumerate(lengths):
        following = 0.0
        for t in reversed(range(length)):
            after = float(values[b, t + 1]) if t + 1 < length else 0.0
            delta = float(rewards[b, t]) + gamma * after - float(values[b, t])
            following = delta + gamma * lam * following
            advantages[b, t] = following
            returns[b, t] = following + float(values[b, t])
    return advantages, returns


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_gae_is_the_loop(gamma: float, lam: float) -> None:
    lengths, width = [7, 1, 5, 3], 7
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(4, width, generator=generator) for _ in range(2))
    mask = response_mask(lengths, width)
    found = gae(rewards * mask, values * mask, mask, gamma=gamma, lam=lam)
    for tensor, expected in zip(found, gae_loop(rewards, values, lengths, gamma, lam), strict=True):
        torch.testing.assert_close(tensor, expected)


def test_gae_by_hand() -> None:
    """Rewards 0, 0, 1; values 0.5, 0.5, 0.5; gamma 0.9, lambda 0.5."""
    mask = response_mask([3], 3)
    values = torch.full((1, 3), 0.5)
    advantages, returns = gae(torch.tensor([[0.0, 0.0, 1.0]]), values, mask, gamma=0.9, lam=0.5)
    # deltas: 0.45 - 0.5, 0.45 - 0.5, 1 - 0.5
    torch.testing.assert_close(advantages, torch.tensor([[0.02875, 0.175, 0.5]]))
    torch.testing.assert_close(returns, advantages + 0.5)


def test_gae_with_lambda_1_and_no_critic_is_the_sum_of_what_follows() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0]])
    advantages, returns = gae(rewards, torch.zeros(1, 3), response_mask([3], 3), gamma=1.0, lam=1.0)
    assert advantages.tolist() == [[7.0, 6.0, 4.0]]
    assert torch.equal(returns, advantages)


def test_gae_with_lambda_0_is_one_step() -> None:
    rewards, values = torch.tensor([[1.0, 2.0]]), torch.tensor([[10.0, 20.0]])
    advantages, _ = gae(rewards, values, response_mask([2], 2), gamma=1.0, lam=0.0)
    assert advantages.tolist() == [[1.0 + 20.0 - 10.0, 2.0 - 20.0]]


def test_value_after_the_end_is_0() -> None:
    """What the critic says behind the last token, or the reward there, does not leak into it."""
    rewards, values = torch.ones(1, 4), torch.ones(1, 4)
    mask = response_mask([2], 4)
    expected = gae(rewards, values, mask, gamma=1.0, lam=0.95)
    rewards[0, 2:], values[0, 2:] = 1e6, -1e6
    for found, wanted in zip(
        gae(rewards, values, mask, gamma=1.0, lam=0.95), expected, strict=True
    ):
        assert torch.equal(found, wanted)
        assert found[0, 2:].tolist() == [0.0, 0.0]


def test_gae_of_one_token() -> None:
    advantages, returns = gae(
        torch.tensor([[3.0]]), torch.tensor([[1.0]]), response_mask([1], 1), gamma=0.9, lam=0.9
    )
    assert (float(advantages), float(returns)) == (2.0, 3.0)


def test_padding_changes_nothing() -> None:
    lengths = [5, 2]
    generator = torch.Generator().manual_seed(2)
    rewards, values = (torch.randn(2, 5, generator=generator) for _ in range(2))
    narrow = response_mask(lengths, 5)
    wide = [torch.nn.functional.pad(x, (0, 4), value=99.0) for x in (rewards, values)]
    found = gae(*wide, response_mask(lengths, 9), gamma=0.9, lam=0.9)
    for tensor, expected in zip(
        found, gae(rewards, values, narrow, gamma=0.9, lam=0.9), strict=True
    ):
        assert torch.equal(tensor[:, :5], expected)
        assert (tensor[:, 5:] == 0).all()
    torch.testing.assert_close(
        whiten(wide[0], response_mask(lengths, 9))[:, :5], whiten(rewards, narrow)
    )


def test_score_is_on_the_last_response_token() -> None:
    """And -kl_coef * kl on every token, the last included."""
    kl = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.0, 0.0]])
    rewards = shape_rewards(
        torch.tensor([2.0, -1.0]), kl, torch.tensor([3, 1]), kl_coef=0.5, clip=5.0
    )
    expected = torch.tensor([[-0.05, -0.1, 2.0 - 0.15], [-1.0 - 0.2, 0.0, 0.0]])
    torch.testing.assert_close(rewards, expected)


def test_score_is_clipped_on_both_sides() -> None:
    rewards = shape_rewards(
        torch.tensor([7.0, -7.0]), torch.zeros(2, 1), torch.ones(2).long(), kl_coef=0.1, clip=5.0
    )
    assert rewards.flatten().tolist() == [5.0, -5.0]


@pytest.mark.parametrize("kl_coef", [0.0, 1.0, -1.0])
def test_rewards_are_no_alias_of_the_kl(kl_coef: float) -> None:
    kl = torch.ones(2, 3)
    rewards = shape_rewards(torch.ones(2), kl, torch.tensor([3, 2]), kl_coef=kl_coef, clip=5.0)
    rewards.fill_(9.0)
    assert torch.equal(kl, torch.ones(2, 3))


def test_whiten_gives_mean_0_and_variance_1_over_response_tokens() -> None:
    generator = torch.Generator().manual_seed(3)
    x = 5 + 3 * torch.randn(4, 9, generator=generator)
    mask = response_mask([9, 4, 1, 6], 9)
    white = whiten(x, mask)
    assert (white[~mask] == 0).all()
    torch.testing.assert_close(white[mask].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(white[mask].var(), torch.tensor(1.0))
    correlation = torch.corrcoef(torch.stack((x[mask], white[mask])))[0, 1]
    torch.testing.assert_close(correlation, torch.tensor(1.0))


def test_whiten_by_hand_and_keeping_the_mean() -> None:
    x, mask = torch.tensor([[1.0, 2.0, 3.0, 100.0]]), response_mask([3], 4)
    torch.testing.assert_close(whiten(x, mask), torch.tensor([[-1.0, 0.0, 1.0, 0.0]]))
    kept = whiten(10 * x, mask, keep_mean=True)
    torch.testing.assert_close(kept, torch.tensor([[19.0, 20.0, 21.0, 0.0]]))


def test_whiten_of_equal_values_is_0_and_not_nan() -> None:
    assert whiten(torch.full((1, 3), 4.0), response_mask([3], 3)).tolist() == [[0.0, 0.0, 0.0]]
    assert whiten(torch.full((1, 1), 4.0), response_mask([1], 1)).tolist() == [[0.0]]


def test_whitening_is_over_the_whole_batch() -> None:
    """Not each row alone: a row of good answers stays good."""
    x = torch.tensor([[1.0, 1.0], [3.0, 3.0]])
    white = whiten(x, torch.ones(2, 2, dtype=torch.bool))
    torch.testing.assert_close(white, torch.tensor([[-1.0, -1.0], [1.0, 1.0]]) * 0.75**0.5)


def test_masked_mean_of_nothing_is_0() -> None:
    assert float(masked_mean(torch.ones(2, 2), torch.zeros(2, 2, dtype=torch.bool))) == 0.0
