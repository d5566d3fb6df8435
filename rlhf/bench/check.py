"""Right tokens first: what is wrong is not timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from rlhf.bench.peers import Answer, Request
from rlhf.bench.peers.hf import pad_left
from rlhf.bench.subject import Subject

CHECKED_TOKENS = 8
ROUNDINGS = 8  # of the largest logit: how far a greedy choice may be from the best


class WrongTokens(ValueError):
    """A peer's greedy tokens are not the model's."""


@torch.no_grad()
def model_logits(subject: Subject, prompts: list[list[int]], answer: Answer) -> list[Tensor]:
    """What the HF forward says of each response position: (T, V) fp32 for each row."""
    rows = [prompt + tokens for prompt, tokens in zip(prompts, answer.tokens, strict=True)]
    ids, mask = pad_left(rows, subject.device)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    longest = max(map(len, answer.tokens))
    output = subject.model(
        ids, attention_mask=mask, position_ids=positions, logits_to_keep=longest + 1
    )
    return [
        output.logits[row, -len(tokens) - 1 : -1].float()
        for row, tokens in enumerate(answer.tokens)
    ]


def check_tokens(
    name: str, generate: Callable[[Request], Answer], subject: Subject, request: Request
) -> None:
    """Greedy tokens must be the HF forward's best, or within rounding of it at this dtype.

    Raises WrongTokens with the first position that is not.
    """
    steps = min(CHECKED_TOKENS, request.new_tokens)
    greedy = Request(request.prompts, steps, 0.0)
    answer = generate(greedy)
    if [len(tokens) for tokens in answer.tokens] != [steps] * len(request.prompts):
        lengths = sorted({len(tokens) for tokens in answer.tokens})
        raise WrongTokens(f"{name}: asked for {steps} tokens, got {lengths}; not timed")
    for row, logits in enumerate(model_logits(subject, request.prompts, answer)):
        chosen = torch.tensor(answer.tokens[row], device=logits.device)
        best = logits.amax(-1)
        missing = best - logits.gather(1, chosen[:, None]).squeeze(1)
        allowed = ROUNDINGS * max(torch.finfo(subject.dtype).eps, 1e-6) * logits.abs().amax()
        wrong = (missing > allowed).nonzero()
        if len(wrong):
            step = int(wrong[0])
            raise WrongTokens(
                f"{name}: greedy token {int(chosen[step])} at step {step} of prompt {row}, HF's is "
                f"{int(logits[step].argmax())}, {float(missing[step]):.3g} above it; not timed"
            )


def logprob_gap(subject: Subject, request: Request, answer: Answer) -> tuple[float, float] | None:
    """Mean and largest |log-prob of the peer - log-prob of the HF forward|, where it gives any."""
    if answer.logprobs is None or request.temperature == 0:
        return None
    gaps: list[float] = []
    for row, logits in enumerate(model_logits(subject, request.prompts, answer)):
        tokens = torch.tensor(answer.tokens[row], device=logits.device)
        truth = (logits / request.temperature).log_softmax(-1)
        truth = truth.gather(1, tokens[:, None]).squeeze(1)
        found = torch.tensor(answer.logprobs[row], device=logits.device)
        gaps += (found - truth).abs().tolist()
    return statistics.fmean(gaps), max(gaps)
