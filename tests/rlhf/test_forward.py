"""Log-probs, values and scores of padded batches, against each sequence alone and plain HF."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf.data import collate_right
from rlhf.models import completion_logprobs, response_logprobs, response_values, sequence_scores

FAMILIES = pytest.mark.parametrize("family", ["llama", "opt"])
PROMPTS = [4, 1, 9, 11]  # lengths of the prompts in `sequences`


@pytest.fixture
def batch(sequences: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """input_ids (4, 17), prompt lengths, response lengths."""
    input_ids, lengths = collate_right(sequences, 0)
    prompts = torch.tensor(PROMPTS)
    return input_ids, prompts, lengths - prompts


def plain_log_softmax(model: nn.Module, sequence: list[int], temperature: float = 1.0) -> Tensor:
    """(T, V), row t predicts token t + 1; by HF's own forward, unpadded."""
    logits = model(input_ids=torch.tensor([sequence])).logits[0]
    return (logits / temperature).log_softmax(-1)


@FAMILIES
@pytest.mark.parametrize("temperature", [1.0, 0.7], ids=["T1", "T0.7"])
@torch.no_grad()
def test_response_logprobs_and_entropy(causal_lm, sequences, batch, family, temperature) -> None:
    model = causal_lm(family)
    logprobs, entropy = response_logprobs(model, *batch, temperature=temperature)
    assert logprobs.shape == entropy.shape == (4, 8)
    assert logprobs.dtype == torch.float32
    for i, (sequence, prompt) in enumerate(zip(sequences, PROMPTS, strict=True)):
        expected = plain_log_softmax(model, sequence, temperature)
        length = len(sequence) - prompt
        for t in range(length):
            row = expected[prompt - 1 + t]
            torch.testing.assert_close(logprobs[i, t], row[sequence[prompt + t]])
            torch.testing.assert_close(entropy[i, t], -(row.exp() * row).sum())
        assert (logprobs[i, length:] == 0).all()
        assert (entropy[i, length:] == 0).all()


@FAMILIES
@torch.no_grad()
def test_values_are_read_where_the_token_is_predicted(scorer, sequences, batch, family) -> None:
    critic = scorer(family)
    values = response_values(critic, *batch)
    for i, (sequence, prompt) in enumerate(zip(sequences, PROMPTS, strict=True)):
        hidden = critic.base_model(input_ids=torch.tensor([sequence])).last_hidden_state[0]
        length = len(sequence) - prompt
        expected = critic.score(hidden[prompt - 1 : -1]).squeeze(-1)
        torch.testing.assert_close(values[i, :length], expected)
        assert (values[i, length:] == 0).all()


@torch.no_grad()
def test_critic_speaks_the_reward_models_units(scorer, batch) -> None:
    """A critic that starts from a normalised reward model starts from its scores."""
    critic = scorer()
    critic.config.score_mean = 3.0
    input_ids, prompts, responses = batch
    values = response_values(critic, input_ids, prompts, responses)
    torch.testing.assert_close(values[:, 0], sequence_scores(critic, input_ids, prompts))


@FAMILIES
@torch.no_grad()
def test_score_is_read_at_the_last_real_token(scorer, sequences, family: str) -> None:
    """By length: pad ids and EOS inside the text do not mislead it."""
    reward = scorer(family)
    input_ids, lengths = collate_right(sequences, 0)
    found = sequence_scores(reward, input_ids, lengths)
    for i, sequence in enumerate(sequences):
        hidden = reward.base_model(input_ids=torch.tensor([sequence])).last_hidden_state
        torch.testing.assert_close(found[i], reward.score(hidden[0, -1])[0])


@FAMILIES
@torch.no_grad()
def test_scores_are_the_logits_of_the_hf_class(scorer, sequences, family: str) -> None:
    """Anyone who loads the model reads the same score, where the text does not end in padding."""
    reward = scorer(family)
    input_ids, lengths = collate_right(sequences, 0)
    mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
    logits = reward(input_ids=input_ids, attention_mask=mask.long()).logits
    torch.testing.assert_close(sequence_scores(reward, input_ids, lengths), logits[:, 0])


@FAMILIES
def test_completion_logprobs_are_those_of_the_marked_tokens(causal_lm, sequences, family) -> None:
    model = causal_lm(family)
    input_ids, lengths = collate_right(sequences, 0)
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(input_ids.shape, generator=generator) < 0.5
    mask &= torch.arange(input_ids.shape[1]) < lengths[:, None]
    mask[:, 0] = True  # has nothing before it, so is never predicted
    found = completion_logprobs(model, input_ids, mask)
    expected = [
        plain_log_softmax(model, sequence)[t - 1, sequence[t]]
        for i, sequence in enumerate(sequences)
        for t in range(1, len(sequence))
        if mask[i, t]
    ]
    torch.testing.assert_close(found, torch.stack(expected))


def readings(models: dict[str, Any], input_ids: Tensor, prompts: Tensor, responses: Tensor):
    """Everything that is read from a batch, with the gradients of its sum."""
    lengths = prompts + responses
    logprobs, entropy = response_logprobs(
        models["actor"], input_ids, prompts, responses, temperature=1.0
    )
    values = response_values(models["scorer"], input_ids, prompts, responses)
    scores = sequence_scores(models["scorer"], input_ids, lengths)
    parameters = [p for model in models.values() for p in model.parameters()]
    total = logprobs.sum() + values.sum() + scores.sum()
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return [logprobs, entropy, values, scores, *(g for g in gradients if g is not None)]


@FAMILIES
def test_the_content_of_padding_changes_nothing(causal_lm, scorer, batch, family: str) -> None:
    models = {"actor": causal_lm(family), "scorer": scorer(family)}
    input_ids, prompts, responses = batch
    expected = readings(models, *batch)
    other = input_ids.clone()
    for row, length in enumerate(prompts + responses):
        other[row, length:] = 17
    for found, wanted in zip(readings(models, other, prompts, responses), expected, strict=True):
        assert torch.equal(found, wanted)


@FAMILIES
def test_the_width_of_padding_changes_nothing(causal_lm, scorer, batch, family: str) -> None:
    models = {"actor": causal_lm(family), "scorer": scorer(family)}
    input_ids, prompts, responses = batch
    wide = nn.functional.pad(input_ids, (0, 13))
    found = readings(models, wide, prompts, responses)
    for tensor, wanted in zip(found, readings(models, *batch), strict=True):
        torch.testing.assert_close(tensor, wanted)  # fp32 rounding: the products have other shapes


@FAMILIES
@torch.no_grad()
def test_no_logits_of_all_positions_exist(causal_lm, batch, family: str) -> None:
    """The (B, T, V) tensor would come from the head's forward."""
    model = causal_lm(family)

    def refuse(*arguments: Any) -> None:
        raise AssertionError("the head was applied to all positions")

    model.get_output_embeddings().register_forward_hook(refuse)
    response_logprobs(model, *batch, temperature=1.0)
    completion_logprobs(model, batch[0], torch.ones_like(batch[0], dtype=torch.bool))
