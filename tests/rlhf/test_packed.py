"""Rows without padding: the same numbers as each row alone, and no token that sees another row."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rlhf.config import LoraConfig
from rlhf.data import collate_right
from rlhf.models import (
    add_adapters,
    completion_logprobs,
    packed,
    reference_of,
    response_logprobs,
    sequence_scores,
)
from rlhf.models.packed import is_packable, packed_hidden_states

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral-window": {"sliding_window": 5},
    "qwen3": {"head_dim": 8},
    "opt": {},
    "gpt2": {},
    "gpt_neox": {},
}
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gpt_neox": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128,
    },
}  # fmt: skip


@pytest.fixture
def build(causal_lm, tokenizer):
    from rlhf.models import build_causal_lm

    def make(name: str, **options: Any) -> nn.Module:
        family = name.split("-")[0]
        options = {**FAMILIES[name], **options}
        if family in ("llama", "opt"):
            return causal_lm(family, **options)
        sizes = SIZES.get(family) or {
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        }  # fmt: skip
        torch.manual_seed(0)
        init = {"model_type": family, **sizes, **options}
        model = build_causal_lm(init, tokenizer, dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model

    return make


def hidden_alone(model: nn.Module, sequence: list[int]) -> Tensor:
    return model.base_model(input_ids=torch.tensor([sequence])).last_hidden_state[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_each_row_is_as_if_it_were_alone(build, sequences, name: str) -> None:
    """In train mode without dropout, gradients included."""
    model = build(name)
    assert is_packable(model)
    input_ids, lengths = collate_right(sequences, 0)
    found, _ = packed_hidden_states(model, input_ids, lengths)
    expected = torch.cat([hidden_alone(model, sequence) for sequence in sequences])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    parameters = list(model.base_model.parameters())
    weights = torch.linspace(-1, 1, found.numel()).view_as(found)
    pairs = [
        torch.autograd.grad((out * weights).sum(), parameters, allow_unused=True)
        for out in (found, expected)
    ]
    for ours, theirs in zip(*pairs, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_no_token_sees_another_row(build, sequences, name: str) -> None:
    """Bit for bit: whatever stands in the other rows."""
    model = build(name)
    input_ids, lengths = collate_right(sequences, 0)
    before, packing = packed_hidden_states(model, input_ids, lengths)
    input_ids[0] = 11
    input_ids[3] = 13
    after, _ = packed_hidden_states(model, input_ids, lengths)
    for row in (1, 2):
        part = slice(int(packing.starts[row]), int(packing.starts[row] + lengths[row]))
        assert torch.equal(after[part], before[part])
    assert not torch.equal(after, before)


def wide(sequences: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    input_ids, lengths = collate_right(sequences, 0)
    mask = torch.arange(input_ids.shape[1]) < lengths.unsqueeze(1)
    mask[:, :2] = False
    return input_ids, lengths, mask


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_losses_and_gradients_equal_the_padded_ones(
    build, sequences, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(name)
    input_ids, lengths, mask = wide(sequences)
    found = []
    for least in (0.0, 1.0):
        calls = []
        monkeypatch.setattr("rlhf.models.forward.LEAST_PADDING", least)
        hook = model.base_model.register_forward_pre_hook(
            lambda module, args, options, calls=calls: calls.append(options["input_ids"].shape),
            with_kwargs=True,
        )
        loss = -completion_logprobs(model, input_ids, mask).sum()
        hook.remove()
        parameters = list(model.parameters())
        found.append((loss, *torch.autograd.grad(loss, parameters)))
        tokens = int(lengths.sum())
        assert calls == [(1, tokens) if least == 0.0 else tuple(input_ids.shape)]
    for packed_value, padded_value in zip(*found, strict=True):
        torch.testing.assert_close(packed_value, padded_value, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_scores_and_responses_are_packed_too(causal_lm, scorer, sequences, monkeypatch) -> None:
    actor, reward = causal_lm(), scorer()
    input_ids, lengths, _ = wide(sequences)
    prompts = torch.tensor([4, 1, 9, 11])
    found = []
    for least in (0.0, 1.0):
        monkeypatch.setattr("rlhf.models.forward.LEAST_PADDING", least)
        both = response_logprobs(actor, input_ids, prompts, lengths - prompts, temperature=0.7)
        found.append([*both, sequence_scores(reward, input_ids, lengths)])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_reference_without_its_adapters_is_packed(causal_lm, sequences, monkeypatch) -> None:
    plain, actor = causal_lm(), add_adapters(causal_lm(), LoraConfig(r=2))
    for name, parameter in actor.named_parameters():
        if ".lora_" in name:
            torch.nn.init.normal_(parameter)
    input_ids, _, mask = wide(sequences)
    monkeypatch.setattr("rlhf.models.forward.LEAST_PADDING", 0.0)
    expected = completion_logprobs(plain, input_ids, mask)
    assert torch.equal(completion_logprobs(reference_of(actor), input_ids, mask), expected)


def test_models_that_cannot_be_packed_are_padded(causal_lm, sequences, monkeypatch) -> None:
    input_ids, _, mask = wide(sequences)
    monkeypatch.setattr(packed, "packed_hidden_states", None)  # would raise
    monkeypatch.setattr("rlhf.models.forward.packed_hidden_states", None)
    eager = causal_lm()
    eager.set_attn_implementation("eager")
    checkpointed = causal_lm()
    checkpointed.gradient_checkpointing_enable()
    for model in (eager, checkpointed):
        assert not is_packable(model)
        assert completion_logprobs(model, input_ids, mask).isfinite().all()


def test_the_models_own_attention_comes_back(causal_lm, sequences) -> None:
    model = causal_lm()
    input_ids, lengths = collate_right(sequences, 0)
    packed_hidden_states(model, input_ids, lengths)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(IndexError):
        packed_hidden_states(model, input_ids + 10_000, lengths)
    assert model.config._attn_implementation == "sdpa"
