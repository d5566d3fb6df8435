"""What actor and critic minimise on a micro-batch: sums, weighted to make the mean of a batch."""

from __future__ import annotations

from torch import Tensor

from rlhf.config import PPOConfig
from rlhf.engines import TrainingEngine
from rlhf.experience import Experience
from rlhf.losses import policy_loss, truncated_importance, value_loss, weighted_sum
from rlhf.models import response_logprobs, response_values
from rlhf.trainers.algorithms import Algorithm
from rlhf.trainers.statistics import UpdateStatistics


def actor_loss(
    actor: TrainingEngine,
    micro: Experience,
    weights: Tensor,
    statistics: UpdateStatistics,
    *,
    config: PPOConfig,
    algorithm: Algorithm,
    kl_coef: float,
) -> Tensor:
    """The clipped surrogate, with the KL penalty and the entropy bonus where they are on.

    Args:
        weights: (B, 1) of each row's tokens in the sum.
    """
    mask = micro.response_mask
    logprobs, entropy = actor(
        response_logprobs, micro.input_ids, micro.prompt_lengths, micro.response_lengths,
        temperature=config.temperature,
    )  # fmt: skip
    importance = None
    if config.importance_cap is not None:
        importance = truncated_importance(
            micro.old_logprobs, micro.sampling_logprobs, cap=config.importance_cap
        )
        statistics.add_importance(importance, mask)
    result = policy_loss(
        logprobs, micro.old_logprobs, micro.advantages, mask, cliprange=config.cliprange,
        dual_clip=config.dual_clip,
        weights=weights if importance is None else weights * importance,
    )  # fmt: skip
    gap = (logprobs.detach() - micro.old_logprobs).abs()
    statistics.add_policy(result, entropy.detach().sum(), gap, mask)
    loss = result.loss
    if algorithm.kl_in_loss:
        kl = algorithm.kl(logprobs, micro.ref_logprobs)
        loss = loss + kl_coef * weighted_sum(kl, mask, weights)
    if config.entropy_coef:
        loss = loss - config.entropy_coef * weighted_sum(entropy, mask, weights)
    return loss


def critic_loss(
    critic: TrainingEngine, micro: Experience, statistics: UpdateStatistics, *, config: PPOConfig
) -> Tensor:
    """The clipped value loss, summed over response tokens."""
    values = critic(response_values, micro.input_ids, micro.prompt_lengths, micro.response_lengths)
    result = value_loss(
        values, micro.values, micro.returns, micro.response_mask,
        cliprange_value=config.cliprange_value,
    )  # fmt: skip
    statistics.add_value(result)
    return result.loss
