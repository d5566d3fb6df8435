"""From scores to advantages. Everything is (B, T) over response tokens, right-padded."""

from __future__ import annotations

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
