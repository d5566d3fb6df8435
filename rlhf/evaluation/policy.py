"""Sample a policy on held-out prompts and measure the answers."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hybrid_engine import HybridEngine, SamplingParams
from rlhf.data import collate_right, decode_completion, to_completion
from rlhf.models import response_logprobs, sequence_scores

# f(prompts, completions, **columns) -> one number each
Metric = Callable[..., list[float]]


@dataclass(frozen=True)
class PolicyEvaluation:
    """Means over the prompts."""

    score: float  # of the reward model
    quality: float | None  # of the metric, if there is one
    kl: float  # nats per response, from the reference
    length: float  # response tokens
    ended: float  # share of responses that stopped by themselves
    completions: list[str]  # one a prompt


def load_metric(path: str) -> Metric:
    """The function that "module:function" names. Raises ValueError if there is none."""
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"evaluation.metric {path!r} is no function: give module:function ({error})"
        ) from error


@torch.no_grad()
def evaluate_policy(
    actor: nn.Module,
    reference: nn.Module,
    reward: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset,
    *,
    max_new_tokens: int,
    metric: Metric | None,
    micro_batch_size: int = 64,
    seed: int = 0,
) -> PolicyEvaluation:
    """Sample one answer to each prompt at temperature 1 and measure it.

    Args:
        prompts: rows with input_ids, the canonical prompt, and the metric's columns.
    """
    for model in (actor, reference, reward):
        model.eval()
    params = SamplingParams(max_new_tokens=max_new_tokens, seed=seed)
    engine = HybridEngine(actor)
    prompt_ids = list(prompts["input_ids"])
    rollout = engine.generate(prompt_ids, params)
    engine.release()
    responses = [rollout.response(i) for i in range(len(prompt_ids))]
    pad_id = int(tokenizer.pad_token_id)
    scores, kl = [], []
    for start in range(0, len(prompt_ids), micro_batch_size):
        rows = slice(start, start + micro_batch_size)
        sequences = [[*p, *r] for p, r in zip(prompt_ids[rows], responses[rows], strict=True)]
        input_ids, lengths = collate_right(sequences, pad_id)
        prompt_lengths = torch.tensor([len(p) for p in prompt_ids[rows]])
        scores.append(sequence_scores(reward, input_ids, lengths))
        part = (rollout.lengths[rows], rollout.logprobs[rows])
        kl.append(_kl(reference, input_ids, prompt_lengths, *part))
    completions = [decode_completion(response, tokenizer) for response in responses]
    return PolicyEvaluation(
        score=float(torch.cat(scores).mean()),
        quality=_mean_metric(metric, prompts, completions),
        kl=float(torch.cat(kl).mean()),
        length=float(rollout.lengths.float().mean()),
        ended=rollout.finish_reasons.count("stop") / len(responses),
        completions=completions,
    )


def _kl(
    reference: nn.Module,
    input_ids: Tensor,
    prompt_lengths: Tensor,
    response_lengths: Tensor,
    logprobs: Tensor,
) -> Tensor:
    """(B,) nats: the k1 estimate summed over each response."""
    ref_logprobs, _ = response_logprobs(
        reference, input_ids, prompt_lengths, response_lengths, temperature=1.0
    )
    return logprobs.sum(1) - ref_logprobs.sum(1)


def _mean_metric(metric: Metric | None, prompts: Dataset, completions: list[str]) -> float | None:
    if metric is None:
        return None
    columns = {
        name: list(prompts[name])
        for name in prompts.column_names
        if name not in ("prompt", "input_ids")
    }
    dialogues = list(prompts["prompt"])
    answers = [to_completion(c, p) for c, p in zip(completions, dialogues, strict=True)]
    values = metric(dialogues, answers, **columns)
    return sum(values) / len(values)
