"""From scores to advantages. Everything is (B, T) over response tokens, right-padded."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hybrid_engine import ops


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x over the True positions of mask; both (B, T). 0 if there are none."""
    return (x * mask).sum() / mask.sum().clamp(min=1)


def whiten(x: Tensor, mask: Tensor, *, keep_mean: bool = False) -> Tensor:
    """Scale the masked entries to variance 1 and, unless `keep_mean`, mean 0; 0 elsewhere.

    The variance is the unbiased one (n - 1), as TRL has it.
    """
    return ops.masked_whiten(x, mask, None, not keep_mean)


def shape_rewards(
    scores: Tensor, kl: Tensor, lengths: Tensor, *, kl_coef: float, clip: float
) -> Tensor:
    """Per-token rewards: -kl_coef * kl everywhere, the clipped score on the last token.

    Args:
        scores: (B,). kl: (B, T), 0 after the end. lengths: (B,), response tokens, at least 1.

    Returns (B, T), a new tensor. Source: arXiv 2203.02155, eq. 2.
    """
    rewards = -kl_coef * kl  # (B, T)
    rows = torch.arange(len(scores), device=scores.device)
    rewards[rows, lengths - 1] += scores.clamp(-clip, clip)
    return rewards


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation, arXiv 1506.02438, eq. 16.

    delta_t = r_t + gamma * V_{t+1} - V_t, A_t = delta_t + gamma * lam * A_{t+1}; the value after
    the last response token is 0, and returns = A + V.

    Args:
        rewards, values: (B, T); mask: (B, T) bool, True on response tokens.

    Returns advantages and returns, (B, T), 0 outside the mask.
    """
    return ops.gae(rewards, values, mask, gamma, lam)


# ---- group methods: no critic, the other responses to a prompt are the baseline -----------------

GROUP_EPS = 1e-4  # under GRPO's standard deviation

# Advantages (B, T) from rewards (B, T), their response mask (B, T), and the number of the prompt of
# each response, groups (B,) int64.
AdvantageFunction = Callable[[Tensor, Tensor, Tensor], Tensor]


def group_statistics(x: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Size, mean and standard deviation (n - 1; 0 for one member) of each member's group.

    x: (B,), groups: (B,) int64. Returns three (B,).
    """
    _, member = groups.unique(return_inverse=True)
    size = torch.zeros_like(x).index_add(0, member, torch.ones_like(x))[member]
    mean = torch.zeros_like(x).index_add(0, member, x)[member] / size
    square = torch.zeros_like(x).index_add(0, member, (x - mean).square())[member]
    return size, mean, (square / (size - 1).clamp(min=1)).sqrt()


def grpo(rewards: Tensor, mask: Tensor, groups: Tensor) -> Tensor:
    """(R - mean of the group) / (std of the group + 1e-4), arXiv 2402.03300."""
    totals = rewards.sum(1)  # (B,)
    _, mean, std = group_statistics(totals, groups)
    return _spread((totals - mean) / (std + GROUP_EPS), mask)


def dr_grpo(rewards: Tensor, mask: Tensor, groups: Tensor) -> Tensor:
    """R - mean of the group: no division by the std, arXiv 2503.20783."""
    totals = rewards.sum(1)
    _, mean, _ = group_statistics(totals, groups)
    return _spread(totals - mean, mask)


def rloo(rewards: Tensor, mask: Tensor, groups: Tensor) -> Tensor:
    """R - mean of the group's others, arXiv 2402.14740; 0 for a response without others."""
    totals = rewards.sum(1)
    size, mean, _ = group_statistics(totals, groups)
    return _spread((totals - mean) * size / (size - 1).clamp(min=1), mask)


def reinforce_pp(rewards: Tensor, mask: Tensor, groups: Tensor) -> Tensor:
    """R - mean of the group, whitened over the whole batch's tokens, arXiv 2501.03262."""
    return whiten(dr_grpo(rewards, mask, groups), mask)


def _spread(advantages: Tensor, mask: Tensor) -> Tensor:
    """(B,) to every response token of its row, 0 elsewhere: (B, T)."""
    return advantages.unsqueeze(1) * mask
