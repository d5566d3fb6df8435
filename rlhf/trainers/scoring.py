"""From a rollout to an experience: log-probs, values, scores, shaped rewards, advantages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

import torch
from torch import Tensor, nn

from hybrid_engine import Rollout
from rlhf import distributed
from rlhf.advantages import gae, shape_rewards, whiten
from rlhf.config import PPOConfig
from rlhf.data import collate_right
from rlhf.engines import Engine
from rlhf.experience import Experience
from rlhf.models import response_logprobs, response_values
from rlhf.rewards import PendingScores, Scores
from rlhf.trainers.algorithms import Algorithm
from rlhf.trainers.rlhf_engine import RLHFEngine


@torch.no_grad()
def measure_rollout(
    engine: RLHFEngine,
    config: PPOConfig,
    prompts: Sequence[Sequence[int]],
    rollout: Rollout,
    *,
    actor: Engine,
    critic: Engine | None,
    reference: Engine,
) -> Experience:
    """What the models say about B responses; prompts holds one entry for each, repeated ones too.

    Scores, rewards, advantages and returns are 0 until `score` and `shape` fill them in.
    """
    sequences = [[*prompt, *rollout.response(i)] for i, prompt in enumerate(prompts)]
    device = rollout.tokens.device
    input_ids = collate_right(sequences, int(engine.tokenizer.pad_token_id))[0].to(device)
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    lengths = rollout.lengths
    zeros = torch.zeros_like(rollout.logprobs)

    def by_part(model: Engine, function: Callable[..., Tensor]) -> Tensor:
        """Forwards of nearly equal lengths, put back in order: (B, T)."""
        found = zeros.clone()
        total = prompt_lengths + lengths
        for rows in total.argsort(stable=True).split(config.micro_batch_size):
            ids = input_ids[rows, : int(total[rows].max())]
            part = model(function, ids, prompt_lengths[rows], lengths[rows])
            found[rows, : part.shape[1]] = part
        return found

    def logprobs(model: nn.Module, *batch: Tensor) -> Tensor:
        return response_logprobs(model, *batch, temperature=config.temperature)[0]

    recompute = config.old_logprobs == "recompute"
    return Experience(
        input_ids=input_ids,
        prompt_lengths=prompt_lengths,
        response_lengths=lengths,
        old_logprobs=by_part(actor, logprobs) if recompute else rollout.logprobs,
        sampling_logprobs=rollout.truncated_logprobs,
        ref_logprobs=by_part(reference, logprobs),
        values=zeros if critic is None else by_part(critic, response_values),
        scores=zeros.new_zeros(len(prompts)),
        rewards=zeros,
        advantages=zeros,
        returns=zeros,
        ended=torch.tensor([r == "stop" for r in rollout.finish_reasons], device=device),
        groups=torch.arange(len(prompts), device=device) // config.samples_per_prompt,
    )


def score(
    engine: RLHFEngine, config: PPOConfig, experience: Experience, pending: PendingScores
) -> Scores:
    """Wait for every part of the reward, and fill in the scores, NaN where all skipped."""
    model_scores = pending.model_scores(
        experience.input_ids, experience.prompt_lengths, experience.lengths,
        micro_batch_size=config.micro_batch_size,
    )  # fmt: skip
    scores = pending.scores(model_scores, device=experience.input_ids.device)
    experience.scores = scores.total - config.missing_eos_penalty * ~experience.ended
    return scores


def gather(experience: Experience, scores: Scores, *, pad_id: int) -> tuple[Experience, Scores]:
    """The responses of all ranks, on every rank; prompts are numbered through."""
    columns = {f.name: getattr(experience, f.name) for f in fields(experience)}
    before = distributed.rank() * 2**32  # ranks' prompts stay apart
    columns["groups"] = columns["groups"] + before
    columns = distributed.gather_rows(columns, padding={"input_ids": pad_id})
    parts = distributed.gather_rows({"total": scores.total, **scores.parts})
    return Experience(**columns), Scores(parts.pop("total"), parts)


def leave_out_skipped(experience: Experience) -> Experience:
    """Without the responses that no reward scored. Raises ValueError if none is left."""
    scored = (~experience.scores.isnan()).nonzero().flatten()
    if not len(scored):
        raise ValueError(
            f"the reward skipped all {len(experience)} responses of a rollout (None from every "
            "reward function): there is nothing to learn from"
        )
    return experience if len(scored) == len(experience) else experience.select(scored)


def shape(
    config: PPOConfig, algorithm: Algorithm, experience: Experience, *, kl_coef: float
) -> None:
    """Fill in rewards, advantages and returns."""
    mask = experience.response_mask
    kl = algorithm.kl(experience.old_logprobs, experience.ref_logprobs)  # (B, T)
    experience.rewards = rewards = shape_rewards(
        experience.scores, kl, experience.response_lengths,
        kl_coef=0.0 if algorithm.kl_in_loss else kl_coef, clip=config.reward_clip,
    )  # fmt: skip
    if config.whiten_rewards:
        experience.rewards = rewards = whiten(rewards, mask, keep_mean=True)
    if algorithm.advantage is not None:
        experience.advantages = algorithm.advantage(rewards, mask, experience.groups)
        experience.returns = experience.advantages
        return
    advantages, experience.returns = gae(
        rewards, experience.values, mask, gamma=config.gamma, lam=config.lam
    )
    experience.advantages = whiten(advantages, mask)
