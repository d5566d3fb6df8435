"""The losses of the three steps. Each is a sum, to be divided by the count of the whole batch.

Sums over micro-batches divided by one global count give the same gradient as the whole batch at
once; a mean of means does not when lengths differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_LOG_RATIO = 20.0  # exp of it is still far from the end of fp32


@dataclass
class PolicyLoss:
    """Sums over response tokens."""

    loss: Tensor  # differentiable
    clipped: Tensor  # tokens whose ratio the clip held back
    approx_kl: Tensor  # of new from old policy, 0.5 * log_ratio^2
    ratio: Tensor  # of the probability ratios
    ratio_square: Tensor  # of their squares


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, *, cliprange: float
) -> PolicyLoss:
    """The clipped surrogate objective, arXiv 1707.06347, eq. 7. All inputs (B, T)."""
    log_ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO) * mask
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    worst = torch.maximum(unclipped, clipped)
    with torch.no_grad():
        held = ((clipped > unclipped) & mask).sum()
    return PolicyLoss(
        loss=(worst * mask).sum(),
        clipped=held,
        approx_kl=0.5 * log_ratio.detach().square().sum(),
        ratio=(ratio.detach() * mask).sum(),
        ratio_square=(ratio.detach().square() * mask).sum(),
    )


@dataclass
class ValueLoss:
    """Sums over response tokens."""

    loss: Tensor  # differentiable
    clipped: Tensor  # tokens whose value the clip held back


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, cliprange_value: float
) -> ValueLoss:
    """Half the larger of the squared errors with and without the clip, in fp32. All (B, T)."""
    values, old_values = values.float(), old_values.float()
    near = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    plain, held = (values - returns).square(), (near - returns).square()
    return ValueLoss(
        loss=0.5 * (torch.maximum(plain, held) * mask).sum(),
        clipped=((held > plain) & mask).sum(),
    )


def preference_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """Sum over pairs of -log sigmoid(chosen - rejected - margin), arXiv 2203.02155, eq. 1.

    Args:
        chosen, rejected: (B,) scores; margin: (B,) or None.
    """
    difference = chosen.float() - rejected.float()
    return -F.logsigmoid(difference if margin is None else difference - margin).sum()
