"""Advantages of PPO and their whitening, over padded (B, T) arrays with a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_engine.ops import check
from hybrid_engine.ops.registry import define_op


def _fake_gae(rewards: Tensor, *args: object) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rewards), torch.empty_like(rewards)


@define_op(
    "gae(Tensor rewards, Tensor values, Tensor mask, float gamma, float lam) -> (Tensor, Tensor)",
    fake=_fake_gae,
)
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates over the tokens of the mask.

    delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lam A_{t+1}; V after the last token
    is 0. Tokens outside of the mask are passed over as if they were not there, so what they hold,
    NaN included, has no influence; their results are 0.

    Args:
        rewards, values: (B, T) fp32; values[:, t] was read where token t is predicted.
        mask: (B, T) bool, true on response tokens.

    Returns (advantages, returns), each (B, T) fp32, with returns = advantages + values.
    Source: arXiv 1506.02438, eq. 16.
    """
    check.operand("rewards", rewards, (-1, -1), torch.float32, rewards)
    check.operand("values", values, rewards.shape, torch.float32, rewards)
    check.operand("mask", mask, rewards.shape, torch.bool, rewards)
    wide_rewards, wide_values = rewards.double(), values.double()
    advantages = torch.zeros_like(wide_rewards)
    next_value = wide_rewards.new_zeros(rewards.shape[0])
    next_advantage = next_value
    for t in reversed(range(rewards.shape[1])):
        inside = mask[:, t]
        delta = wide_rewards[:, t] + gamma * next_value - wide_values[:, t]
        next_advantage = torch.where(inside, delta + gamma * lam * next_advantage, next_advantage)
        next_value = torch.where(inside, wide_values[:, t], next_value)
        advantages[:, t] = torch.where(inside, next_advantage, 0.0)
    returns = torch.where(mask, advantages + wide_values, 0.0)
    return advantages.float(), returns.float()


def _fake_moments(x: Tensor, mask: Tensor) -> Tensor:
    return x.new_empty(3, dtype=torch.float64)


@define_op("masked_moments(Tensor x, Tensor mask) -> Tensor", fake=_fake_moments)
def masked_moments(x: Tensor, mask: Tensor) -> Tensor:
    """[count, sum, sum of squares] of x where the mask is set, (3,) fp64.

    Added up over data-parallel ranks they are the moments of the whole batch. x: fp32 of any shape;
    mask: bool of the same shape.
    """
    _check_masked(x, mask)
    members = x[mask].double()
    return torch.stack((mask.sum().double(), members.sum(), members.square().sum()))


def _fake_whiten(x: Tensor, *args: object) -> Tensor:
    return torch.empty_like(x)


@define_op(
    "masked_whiten(Tensor x, Tensor mask, Tensor? moments=None, bool shift_mean=True, "
    "float eps=1e-08) -> Tensor",
    fake=_fake_whiten,
)
def masked_whiten(
    x: Tensor,
    mask: Tensor,
    moments: Tensor | None = None,
    shift_mean: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) where the mask is set, 0 elsewhere.

    Args:
        x: fp32 of any shape; mask: bool of the same shape.
        moments: (3,) fp64 from `masked_moments`, of more than this x if need be; None: of this x.
        shift_mean: False adds the mean back.

    The variance has Bessel's correction (n - 1), and is 0 for a single member.
    """
    _check_masked(x, mask)
    check.operand("moments", moments, (3,), torch.float64, x)
    known = masked_moments.reference(x, mask) if moments is None else moments
    count, total, squares = known.unbind()
    mean = total / count.clamp(min=1)
    variance = ((squares - count * mean * mean) / (count - 1).clamp(min=1)).clamp(min=0)
    whitened = (x.double() - mean) * torch.rsqrt(variance + eps)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, 0.0).float()


def _check_masked(x: Tensor, mask: Tensor) -> None:
    check.operand("x", x, x.shape, torch.float32, x)
    check.operand("mask", mask, x.shape, torch.bool, x)
