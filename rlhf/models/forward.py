"""Log-probs, values and scores of right-padded batches.

No attention mask is needed: attention is causal, padding is at the right, and whatever is read is
read at positions found by length. Where there is much padding it is left out (`packed`). Log-probs
come from the hidden states, so no (B, T, V) tensor exists. A model in train mode has its dropout
on; call `eval()` for anything but SFT.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hybrid_engine.ops import linear_logprob
from rlhf.models.packed import LEAST_PADDING, is_packable, packed_hidden_states


def completion_logprobs(model: nn.Module, input_ids: Tensor, loss_mask: Tensor) -> Tensor:
    """Log-probs of the tokens marked in `loss_mask`, as one flat tensor.

    Args:
        model: a causal language model. input_ids: (B, T) int64. loss_mask: (B, T) bool; the
            first column is never predicted.

    Returns (loss_mask[:, 1:].sum(),) fp32.
    """
    rows, columns = loss_mask[:, 1:].nonzero(as_tuple=True)  # (N,), predicts the next column
    steps = torch.arange(input_ids.shape[1], device=input_ids.device)
    lengths = (steps * loss_mask).amax(1) + 1  # (B,), what comes after the last one is not needed
    hidden = _hidden_at(model, input_ids, lengths, rows, columns)
    logprobs, _ = _head_logprobs(model, hidden, input_ids[rows, columns + 1], 1.0)
    return logprobs


def sequence_logprobs(model: nn.Module, input_ids: Tensor, loss_mask: Tensor) -> Tensor:
    """The summed log-prob of the marked tokens of each sequence, (B,) fp32.

    Arguments as of `completion_logprobs`.
    """
    logprobs = completion_logprobs(model, input_ids, loss_mask)
    return _scatter(logprobs, loss_mask[:, 1:]).sum(1)


def response_logprobs(
    model: nn.Module,
    input_ids: Tensor,
    prompt_lengths: Tensor,
    response_lengths: Tensor,
    *,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies of the response tokens.

    Args:
        model: a causal language model. input_ids: (B, P + T) int64. prompt_lengths,
            response_lengths: (B,) int64. temperature: divides the logits.

    Returns two (B, T) fp32 with T the longest response; 0 after the end.
    """
    rows, columns, mask = _predicting_positions(prompt_lengths, response_lengths)
    lengths = prompt_lengths + response_lengths
    hidden = _hidden_at(model, input_ids, lengths, rows, columns)
    targets = input_ids[rows, columns + 1]  # (N,)
    logprobs, entropy = _head_logprobs(model, hidden, targets, temperature)
    return _scatter(logprobs, mask), _scatter(entropy, mask)


def response_values(
    critic: nn.Module, input_ids: Tensor, prompt_lengths: Tensor, response_lengths: Tensor
) -> Tensor:
    """The critic's value at the position that predicts each response token, (B, T) fp32.

    `critic` is a sequence classification model with one label; one that was a normalised reward
    model starts from its normalised scores.
    """
    rows, columns, mask = _predicting_positions(prompt_lengths, response_lengths)
    lengths = prompt_lengths + response_lengths
    hidden = _hidden_at(critic, input_ids, lengths, rows, columns)
    return _scatter(_score(critic, hidden), mask)


def sequence_scores(scorer: nn.Module, input_ids: Tensor, lengths: Tensor) -> Tensor:
    """The reward model's score at the last real token of each sequence, (B,) fp32."""
    rows = torch.arange(len(lengths), device=lengths.device)
    return _score(scorer, _hidden_at(scorer, input_ids, lengths, rows, lengths - 1))


def _hidden_at(
    model: nn.Module, input_ids: Tensor, lengths: Tensor, rows: Tensor, columns: Tensor
) -> Tensor:
    """Hidden states (N, D), after the final norm, at N places of right-padded ids (B, T)."""
    padding = 1 - float(lengths.sum()) / max(1, input_ids.numel())
    if padding > LEAST_PADDING and is_packable(model):
        hidden, packing = packed_hidden_states(model, input_ids, lengths)
        return hidden[packing.starts[rows] + columns]
    hidden = model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state  # type: ignore[operator]
    return hidden[rows, columns]


def _score(scorer: nn.Module, hidden: Tensor) -> Tensor:
    """(N, D) -> (N,) fp32. A scorer that was normalised has the mean to subtract in its config."""
    scores = scorer.score(hidden).squeeze(-1).float()  # type: ignore[operator]
    return scores - getattr(scorer.config, "score_mean", 0.0)


def _head_logprobs(
    model: nn.Module, hidden: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    head = model.get_output_embeddings()  # type: ignore[operator]
    softcap = getattr(model.config, "final_logit_softcapping", None) or 0.0
    return linear_logprob(
        hidden, head.weight, targets, bias=head.bias, temperature=temperature, softcap=softcap
    )


def _predicting_positions(
    prompt_lengths: Tensor, response_lengths: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns (N,) of the positions that predict a response token, and the (B, T) mask."""
    steps = torch.arange(int(response_lengths.max()), device=response_lengths.device)
    mask = steps < response_lengths.unsqueeze(1)  # (B, T)
    rows, tokens = mask.nonzero(as_tuple=True)
    return rows, prompt_lengths[rows] - 1 + tokens, mask


def _scatter(flat: Tensor, mask: Tensor) -> Tensor:
    """(N,) to the True positions of (B, T), zeros elsewhere."""
    return flat.new_zeros(mask.shape).masked_scatter(mask, flat)
