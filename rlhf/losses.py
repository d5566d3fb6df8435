"""The losses of the three steps. Each is a sum, to be divided by the count of the whole batch.

Sums over micro-batches divided by one global count give the same gradient as the whole batch at
once; a mean of means does not when lengths differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_LOG_RATIO = 20.0  # exp of it is still far from the end of fp32


@dataclass
class PolicyLoss:
    """Sums over response tokens."""

    loss: Tensor  # differentiable, weighted
    clipped: Tensor  # tokens whose ratio the clip held back
    approx_kl: Tensor  # of new from old policy, 0.5 * log_ratio^2
    ratio: Tensor  # of the probability ratios
    ratio_square: Tensor  # of their squares


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    cliprange: float,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
) -> PolicyLoss:
    """The clipped surrogate objective, arXiv 1707.06347, eq. 7. All inputs (B, T).

    Args:
        dual_clip: a token with a negative advantage costs at most dual_clip * -A, whatever its
            ratio: arXiv 1912.09729. Above 1; None: off.
        weights: (B, T) or (B, 1) of each token in the sum; None: 1.
    """
    log_ratio = (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO) * mask
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    worst = torch.maximum(unclipped, clipped)
    if dual_clip is not None:
        worst = torch.where(advantages < 0, worst.minimum(-advantages * dual_clip), worst)
    with torch.no_grad():
        held = ((clipped > unclipped) & mask).sum()
    return PolicyLoss(
        loss=weighted_sum(worst, mask, weights),
        clipped=held,
        approx_kl=0.5 * log_ratio.detach().square().sum(),
        ratio=(ratio.detach() * mask).sum(),
        ratio_square=(ratio.detach().square() * mask).sum(),
    )


def weighted_sum(x: Tensor, mask: Tensor, weights: Tensor | None = None) -> Tensor:
    """Of x over the True positions of mask, both (B, T); weights (B, T), (B, 1) or None for 1."""
    kept = x * mask
    return (kept if weights is None else kept * weights).sum()


Aggregation = Literal["token", "sequence", "constant"]


def aggregation_weights(
    how: Aggregation, lengths: Tensor, *, tokens: int, sequences: int, max_length: int
) -> Tensor:
    """The weight of each row's tokens under which a sum is the wanted mean over a batch, (B, 1).

    "token": over its response tokens. "sequence": over its sequences, of the mean over each one's
    tokens (GRPO). "constant": of all tokens over sequences * max_length, so that no response is
    weighted by its length (Dr. GRPO, arXiv 2503.20783).

    Args:
        lengths: (B,) response tokens of these rows. tokens, sequences: of the whole batch, over all
            micro-batches and ranks. max_length: the longest response allowed.
    """
    if how == "sequence":
        return 1 / (sequences * lengths.unsqueeze(1).float())
    count = tokens if how == "token" else sequences * max_length
    return torch.full((len(lengths), 1), 1 / count, device=lengths.device)


def truncated_importance(logprobs: Tensor, sampling_logprobs: Tensor, *, cap: float) -> Tensor:
    """min(pi / mu, cap) of the policy that is trained and the distribution sampled from, (B, T).

    Weights that undo what the rollout's numerics, or truncated sampling, did to the distribution.
    Source: https://fengyao.notion.site/off-policy-rl ("truncated importance sampling").

    Args:
        logprobs: under the training forward, before the update. sampling_logprobs: as sampled.
    """
    return (logprobs - sampling_logprobs).exp().clamp(max=cap)


@dataclass
class ValueLoss:
    """Sums over response tokens."""

    loss: Tensor  # differentiable
    clipped: Tensor  # tokens whose value the clip held back


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, *, cliprange_value: float
) -> ValueLoss:
    """Half the larger of the squared errors with and without the clip, in fp32. All (B, T).

    A value inside the clip stays what it is, to the last bit, so that none is counted as held back.
    """
    values, old_values = values.float(), old_values.float()
    near = values.clamp(old_values - cliprange_value, old_values + cliprange_value)
    plain, held = (values - returns).square(), (near - returns).square()
    return ValueLoss(
        loss=0.5 * (torch.maximum(plain, held) * mask).sum(),
        clipped=((held > plain) & mask).sum(),
    )


@dataclass
class DPOLoss:
    """Of B pairs."""

    loss: Tensor  # (), their sum, differentiable
    chosen_rewards: Tensor  # (B,), beta * log-ratio to the reference
    rejected_rewards: Tensor  # (B,)


def dpo_loss(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: float,
    kind: str = "sigmoid",
    label_smoothing: float = 0.0,
) -> DPOLoss:
    """Sum over pairs; h is the difference of the log-ratios of chosen and rejected.

    sigmoid: -(1 - s) log sigmoid(beta h) - s log sigmoid(-beta h), arXiv 2305.18290, eq. 7, with
    label smoothing s as in arXiv 2403.00409, eq. 3, up to its unbiasing factor.
    ipo: (h - 1 / (2 beta))^2, arXiv 2310.12036, eq. 17.

    Args:
        chosen, rejected, ref_chosen, ref_rejected: (B,) log-probs of whole completions.
    """
    chosen_ratio, rejected_ratio = chosen - ref_chosen, rejected - ref_rejected
    h = chosen_ratio - rejected_ratio  # (B,)
    if kind == "ipo":
        losses = (h - 1 / (2 * beta)).square()
    else:
        right, wrong = F.logsigmoid(beta * h), F.logsigmoid(-beta * h)
        losses = -(1 - label_smoothing) * right - label_smoothing * wrong
    return DPOLoss(losses.sum(), beta * chosen_ratio.detach(), beta * rejected_ratio.detach())


def preference_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: Tensor | None = None,
    *,
    centring_coef: float = 0.0,
) -> Tensor:
    """Sum over pairs of -log sigmoid(chosen - rejected - margin), arXiv 2203.02155, eq. 1.

    With a margin as in arXiv 2307.09288, eq. 2; centring_coef * (chosen + rejected)^2 is added, as
    in arXiv 2312.09244, section 3.2: differences leave the level of the scores open.

    Args:
        chosen, rejected: (B,) scores; margin: (B,) or None.
    """
    chosen, rejected = chosen.float(), rejected.float()
    difference = chosen - rejected
    losses = -F.logsigmoid(difference if margin is None else difference - margin)
    if centring_coef:
        losses = losses + centring_coef * (chosen + rejected).square()
    return losses.sum()
