"""Equal beginnings of prompts are computed and cached once, and nobody can tell."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hybrid_engine import EngineConfig, HybridEngine, SamplingParams
from hybrid_engine.models import Decoder

PROMPT = torch.randint(3, 97, (64,), generator=torch.Generator().manual_seed(2)).tolist()
SAMPLED = SamplingParams(max_new_tokens=12, seed=3)


@pytest.fixture
def prefilled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Tokens of each prefill pass."""
    passes: list[int] = []
    forward = Decoder.hidden_states

    def counted(self: Decoder, batch, cache, on_layer=None) -> torch.Tensor:
        if batch.cu_seqlens is not None:
            passes.append(len(batch.tokens))
        return forward(self, batch, cache, on_layer)

    monkeypatch.setattr(Decoder, "hidden_states", counted)
    return passes


def unshared(build, prompts: list[list[int]], params: SamplingParams) -> torch.Tensor:
    """One sequence at a time, so that there is nobody to share with."""
    return (
        HybridEngine(build("llama"), EngineConfig(max_running=1)).generate(prompts, params).tokens
    )


@pytest.mark.parametrize("length", [64, 61, 16, 3, 1])
def test_n_samples_prefill_once(build, prefilled: list[int], length: int) -> None:
    prompt = PROMPT[:length]
    params = SamplingParams(max_new_tokens=12, seed=3, n=8)
    rollout = HybridEngine(build("llama")).generate([prompt], params)
    assert prefilled == [length]
    assert torch.equal(rollout.tokens, unshared(build, [prompt] * 8, SAMPLED))
    assert len({tuple(tokens) for tokens in rollout.tokens.tolist()}) > 4


def test_strided_duplicates(build, prefilled: list[int]) -> None:
    prompts = [PROMPT[:30], PROMPT[30:], [5, 6]] * 3
    rollout = HybridEngine(build("llama")).generate(prompts, SAMPLED)
    assert prefilled == [30 + 34 + 2]
    assert torch.equal(rollout.tokens, unshared(build, prompts, SAMPLED))


def test_common_system_prompt(build, prefilled: list[int]) -> None:
    """Whole blocks of 16 are shared: 48 of the 50 common tokens."""
    prompts = [[*PROMPT[:50], token, token + 1] for token in range(5, 11)]
    rollout = HybridEngine(build("llama")).generate(prompts, SAMPLED)
    assert prefilled == [52 + 5 * (52 - 48)]
    assert torch.equal(rollout.tokens, unshared(build, prompts, SAMPLED))


def test_who_comes_later_shares_with_who_still_runs(build, prefilled: list[int]) -> None:
    first = EngineConfig(max_running=2)
    prompts = [PROMPT[:40], [7, 8], PROMPT[:40]]
    stop = HybridEngine(build("llama")).generate(prompts, SAMPLED).response(1)[1]
    prefilled.clear()
    params = SamplingParams(max_new_tokens=12, seed=3, stop_token_ids=(stop,))
    rollout = HybridEngine(build("llama"), first).generate(prompts, params)
    assert int(rollout.lengths[1]) <= 2 < int(rollout.lengths[0])
    assert prefilled == [42, 8]  # the third finds two full blocks of the first
    assert torch.equal(rollout.tokens, unshared(build, prompts, params))


def test_sharing_under_preemption(build) -> None:
    model = build("llama")
    block = 2 * 2 * 2 * 4 * 16 * 4  # layers, keys and values, kv heads, block size, head_dim, fp32
    tight = EngineConfig(block_size=4, max_cache_gb=16 * block / 1e9)
    params = SamplingParams(max_new_tokens=20, seed=3, n=6)
    rollout = HybridEngine(model, tight).generate([PROMPT[:11], PROMPT[:9]], params)
    assert torch.equal(rollout.tokens, HybridEngine(model).generate([PROMPT[:11], PROMPT[:9]],
                                                                     params).tokens)  # fmt: skip
