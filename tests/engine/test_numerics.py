"""How far the decoder's numbers are from the truth: at most twice as far as Hugging Face's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from hybrid_engine import HybridEngine, Rollout, SamplingParams, models
from hybrid_engine.cache import KVCache
from hybrid_engine.models import Decoder, DecoderBatch, find_family

FAMILIES = pytest.mark.parametrize("family", models.FAMILIES)
BLOCK = 16


def decoder_logits(model: nn.Module, prompt: list[int], prefilled: int) -> Tensor:
    """(T, V): the first `prefilled` tokens in one pass, the others one by one."""
    decoder = Decoder(model, find_family(model))
    decoder.refresh()
    blocks = -(-len(prompt) // BLOCK)
    cache = KVCache(
        layers=decoder.num_layers, num_blocks=blocks, kv_heads=decoder.kv_heads, block_size=BLOCK,
        head_dim=decoder.head_dim, dtype=decoder.dtype, device=decoder.device,
    )  # fmt: skip
    tables = torch.arange(blocks - 1, -1, -1, dtype=torch.int32).unsqueeze(0)  # not in order

    def forward(start: int, end: int) -> Tensor:
        positions = torch.arange(start, end)
        slots = tables[0, positions // BLOCK] * BLOCK + positions % BLOCK
        batch = DecoderBatch(
            tokens=torch.tensor(prompt[start:end]), positions=positions, slot_mapping=slots.long(),
            block_tables=tables, seq_lens=torch.tensor([end], dtype=torch.int32),
            cu_seqlens=torch.tensor([0, end - start], dtype=torch.int32) if start == 0 else None,
            max_query_len=end - start,
        )  # fmt: skip
        return decoder.logits(decoder.hidden_states(batch, cache))

    spans = [(0, prefilled), *((i, i + 1) for i in range(prefilled, len(prompt)))]
    with torch.inference_mode():
        return torch.cat([forward(*span) for span in spans])


@torch.no_grad()
def hf_logits(model: nn.Module, prompt: list[int]) -> Tensor:
    return model(torch.tensor([prompt])).logits[0]


@FAMILIES
@pytest.mark.parametrize("prefilled", [40, 1], ids=["prefill", "decode"])
def test_bf16_logits_within_twice_hf_error(build, prompts, family: str, prefilled: int) -> None:
    model = build(family).to(torch.bfloat16)
    truth = hf_logits(copy.deepcopy(model).float(), prompts[4])  # (T, V)
    found = decoder_logits(model, prompts[4], prefilled)
    assert found.dtype == torch.bfloat16
    error = (found.float() - truth).norm()
    hf_error = (hf_logits(model, prompts[4]).float() - truth).norm()
    assert hf_error > 0
    assert error <= 2 * hf_error


def training_logprobs(
    model: nn.Module, prompts: list[list[int]], rollout: Rollout, temperature: float
) -> list[Tensor]:
    """Log-probs of the sampled tokens by the model's own forward and log-softmax."""
    found = []
    for i, prompt in enumerate(prompts):
        response = rollout.response(i)
        logits = hf_logits(model, [*prompt, *response])[len(prompt) - 1 : -1]
        log_softmax = (logits / temperature).log_softmax(-1)
        found.append(log_softmax.gather(1, torch.tensor(response)[:, None]).squeeze(1))
    return found


@FAMILIES
@pytest.mark.parametrize("temperature", [1.0, 0.6], ids=["T1", "T0.6"])
def test_logprobs_are_those_of_the_training_forward(
    build, prompts, family: str, temperature: float
) -> None:
    """Within twice the error of the fp32 training forward against fp64."""
    model = build(family)
    params = SamplingParams(max_new_tokens=24, temperature=temperature, seed=3)
    rollout = HybridEngine(model).generate(prompts, params)
    lengths = rollout.lengths.tolist()
    sampled = torch.cat([rollout.logprobs[i, :n] for i, n in enumerate(lengths)]).double()
    wide = copy.deepcopy(model).double()
    truth = torch.cat(training_logprobs(wide, prompts, rollout, temperature))
    plain = torch.cat(training_logprobs(model, prompts, rollout, temperature)).double()
    error, plain_error = (sampled - truth).norm(), (plain - truth).norm()
    assert plain_error > 0
    assert error <= 2 * plain_error


def test_greedy_logprobs_are_at_temperature_one(build, prompts) -> None:
    model = build("llama")
    params = SamplingParams(max_new_tokens=24, temperature=0.0)
    rollout = HybridEngine(model).generate(prompts, params)
    expected = torch.stack(training_logprobs(model, prompts, rollout, 1.0))
    torch.testing.assert_close(rollout.logprobs, expected)
    assert (rollout.truncated_logprobs == 0).all()
