"""Sample a policy on held-out prompts and measure the answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from hybrid_engine import EngineConfig, HybridEngine, Rollout, SamplingParams, sequence_seeds
from rlhf import distributed
from rlhf.data import collate_right, decode_completion, to_completion
from rlhf.engines import Engine
from rlhf.models import response_logprobs
from rlhf.rewards import Reward, RewardFunction, call_function


@dataclass(frozen=True)
class PolicyEvaluation:
    """Means over the prompts."""

    score: float  # of the reward
    quality: float | None  # of the metric, if there is one
    kl: float  # nats per response, from the reference
    length: float  # response tokens
    ended: float  # share of responses that stopped by themselves
    completions: list[str]  # one a prompt
    scores: list[float]  # one a prompt; NaN where the reward skipped it
    lengths: list[int]  # response tokens, one a prompt


@torch.no_grad()
def evaluate_policy(
    policy: Engine,
    reference: Engine,
    reward: Reward,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset,
    *,
    max_new_tokens: int,
    metric: RewardFunction | None,
    temperature: float = 1.0,
    engine_config: EngineConfig | None = None,
    micro_batch_size: int = 64,
    seed: int = 0,
) -> PolicyEvaluation:
    """Sample one answer to each prompt and measure it.

    Ranks divide the prompts among them; what does not divide evenly is left out.

    Args:
        prompts: rows with input_ids, the canonical prompt, and the metric's columns.
    """
    for model in (policy, reference):
        model.module.eval()
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature)
    even = len(prompts) // distributed.world_size() * distributed.world_size()
    seeds = sequence_seeds(list(prompts["input_ids"]), seed)[:even]
    prompts = prompts.select(distributed.share(range(even)))
    pending = reward.start(list(prompts["prompt"]), _columns(prompts), tokenizer)
    prompt_ids = list(prompts["input_ids"])
    with policy.for_rollout():
        engine = HybridEngine(policy.module, engine_config)
        rollout = engine.generate(
            prompt_ids, params, seeds=list(distributed.share(seeds)), on_finish=pending.submit
        )
        engine.release()
    sequences = _sequences(prompt_ids, rollout, int(tokenizer.pad_token_id))
    of_model = pending.model_scores(*sequences, micro_batch_size=micro_batch_size)
    scores = pending.scores(of_model, device=rollout.tokens.device).total
    kl = _kl(
        reference, sequences, rollout,
        temperature=temperature or 1.0, micro_batch_size=micro_batch_size,
    )  # fmt: skip
    return _measured(rollout, scores, kl, tokenizer, prompts, metric)


def try_metric(metric: RewardFunction | None, prompts: Dataset) -> None:
    """Call a metric with an empty answer to one prompt, so that it fails before training if at all.

    Raises FunctionError.
    """
    _sum_of_metric(metric, prompts.select([0]), [""])


def _sequences(
    prompt_ids: list[list[int]], rollout: Rollout, pad_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts with their responses: right-padded ids (B, L), prompt and total lengths (B,)."""
    joined = [[*prompt, *rollout.response(i)] for i, prompt in enumerate(prompt_ids)]
    input_ids, lengths = collate_right(joined, pad_id)
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompt_ids])
    device = rollout.tokens.device
    return input_ids.to(device), prompt_lengths.to(device), lengths.to(device)


def _kl(
    reference: Engine,
    sequences: tuple[Tensor, Tensor, Tensor],
    rollout: Rollout,
    *,
    temperature: float,
    micro_batch_size: int,
) -> Tensor:
    """(B,) nats: the k1 estimate summed over each response."""
    input_ids, prompt_lengths, _ = sequences
    columns = (input_ids, prompt_lengths, rollout.lengths, rollout.logprobs)
    found = []
    for *micro, logprobs in zip(*(c.split(micro_batch_size) for c in columns), strict=True):
        ref_logprobs, _ = reference(response_logprobs, *micro, temperature=temperature)
        found.append(logprobs.sum(1) - ref_logprobs.sum(1))
    return torch.cat(found)


def _measured(
    rollout: Rollout,
    scores: Tensor,
    kl: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset,
    metric: RewardFunction | None,
) -> PolicyEvaluation:
    """Means over the prompts of all ranks, from this rank's scores and KL, (B,)."""
    count = len(prompts)
    completions = [decode_completion(rollout.response(i), tokenizer) for i in range(count)]
    quality, judged = _sum_of_metric(metric, prompts, completions)
    return PolicyEvaluation(
        score=distributed.mean(float(scores.nansum()), int((~scores.isnan()).sum())),
        quality=None if metric is None else distributed.mean(quality, judged),
        kl=distributed.mean(float(kl.sum()), count),
        length=distributed.mean(float(rollout.lengths.sum()), count),
        ended=distributed.mean(rollout.finish_reasons.count("stop"), count),
        completions=distributed.all_of(completions),
        scores=distributed.all_of(scores.tolist()),
        lengths=distributed.all_of(rollout.lengths.tolist()),
    )


def _columns(prompts: Dataset) -> dict[str, list[Any]]:
    """What the data has beside the prompt, for reward functions."""
    names = [name for name in prompts.column_names if name not in ("prompt", "input_ids")]
    return {name: list(prompts[name]) for name in names}


def _sum_of_metric(
    metric: RewardFunction | None, prompts: Dataset, completions: list[str]
) -> tuple[float, int]:
    """The sum, and of how many; answers that the metric skips do not count."""
    if metric is None:
        return 0.0, 0
    dialogues = list(prompts["prompt"])
    answers = [to_completion(c, p) for c, p in zip(completions, dialogues, strict=True)]
    values = [v for v in call_function(metric, dialogues, answers, _columns(prompts)) if v == v]
    return sum(values), len(values)
