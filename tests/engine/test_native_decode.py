"""Decoding in one native call says what decoding layer by layer in Python says."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from hybrid_engine import EngineConfig, HybridEngine, Rollout, SamplingParams, ops
from hybrid_engine.cache import KVCache
from hybrid_engine.generation.loop import MOST_STEPS, GenerationLoop
from hybrid_engine.models import DecodeProgram, Decoder, find_family

pytestmark = pytest.mark.skipif(
    ops.NATIVE.library is None, reason=f"native only: {ops.NATIVE.reason}"
)

PARAMS = {
    "greedy": SamplingParams(max_new_tokens=40, temperature=0.0),
    "sampled": SamplingParams(max_new_tokens=40, seed=3),
    "top_p": SamplingParams(max_new_tokens=40, top_p=0.8, temperature=0.7, seed=4),
    "top_k-min_p": SamplingParams(max_new_tokens=40, top_k=9, min_p=0.05, seed=5),
    "penalty": SamplingParams(max_new_tokens=40, repetition_penalty=1.3, top_p=0.9, seed=6),
    "min_new_tokens": SamplingParams(max_new_tokens=40, min_new_tokens=9, seed=7),
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {"sliding_window": 8, "attn_implementation": "eager"}),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "bloom": ("bloom", {}),
}


@pytest.fixture
def steps_taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many steps each native call took; by one thread, which never tries a few with fewer."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    taken: list[int] = []
    run = DecodeProgram.run

    def counted(self: DecodeProgram, *arguments: Any) -> int:
        taken.append(run(self, *arguments))
        return taken[-1]

    monkeypatch.setattr(DecodeProgram, "run", counted)
    yield taken
    torch.set_num_threads(threads)


def assert_same(found: Rollout, expected: Rollout) -> None:
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.lengths, expected.lengths)
    assert found.finish_reasons == expected.finish_reasons
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        found.truncated_logprobs, expected.truncated_logprobs, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", PARAMS)
def test_sampling_and_stops_equal_python(
    build, prompts, step_by_step, steps_taken: list[int], name: str
) -> None:
    model = build("llama")
    model.generation_config.eos_token_id = [2, 9, 33, 40, 71]
    engine = HybridEngine(model)
    expected = step_by_step(lambda: engine.generate(prompts, PARAMS[name]))
    assert not steps_taken
    assert_same(engine.generate(prompts, PARAMS[name]), expected)
    assert steps_taken
    assert len(set(expected.lengths.tolist())) > 2


@pytest.mark.parametrize("name", FAMILIES)
def test_families_equal_python(build, prompts, step_by_step, steps_taken, name: str) -> None:
    family, options = FAMILIES[name]
    engine = HybridEngine(build(family, **options))
    params = SamplingParams(max_new_tokens=20, top_p=0.9, seed=1)
    expected = step_by_step(lambda: engine.generate(prompts, params))
    assert_same(engine.generate(prompts, params), expected)
    assert steps_taken


def test_a_call_takes_many_steps(build, steps_taken: list[int]) -> None:
    """Until a sequence ends, or the most that a call may take; blocks come ahead of need."""
    engine = HybridEngine(build("llama"), EngineConfig(block_size=4))
    engine.generate([[1, 5, 9], [1, 6]], SamplingParams(max_new_tokens=80, stop_token_ids=()))
    assert steps_taken == [MOST_STEPS, MOST_STEPS, 79 - 2 * MOST_STEPS]


def test_a_call_ends_with_the_first_stop_token(build, prompts, steps_taken: list[int]) -> None:
    model = build("llama")
    params = SamplingParams(max_new_tokens=24, temperature=0.0, stop_token_ids=())
    free = HybridEngine(model).generate(prompts[:2], params)
    stop = free.response(1)[7]
    steps_taken.clear()
    stopping = dataclasses.replace(params, stop_token_ids=(stop,))
    rollout = HybridEngine(model).generate(prompts[:2], stopping)
    ends = sorted({response.index(stop) if stop in response else 23
                   for response in (free.response(0), free.response(1))})  # fmt: skip
    assert steps_taken == [b - a for a, b in zip([0, *ends], ends, strict=False)]
    assert rollout.response(1) == free.response(1)[: free.response(1).index(stop) + 1]


def test_little_cache_changes_no_token(build, prompts, steps_taken: list[int]) -> None:
    """With no block to spare, calls get short and sequences are preempted."""
    model = build("llama")
    expected = HybridEngine(model).generate(prompts, PARAMS["sampled"])
    few = len(steps_taken)
    size = KVCache.bytes_per_block(
        layers=2, kv_heads=2, block_size=4, head_dim=16, dtype=torch.float32
    )
    config = EngineConfig(block_size=4, max_cache_gb=25.5 * size / 1e9)
    assert_same(HybridEngine(model, config).generate(prompts, PARAMS["sampled"]), expected)
    assert len(steps_taken) > 2 * few


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_stays_near_python(build, prompts, step_by_step, dtype) -> None:
    """Log-probs of the same tokens differ by roundings of the dtype, no more than HF's own do."""
    model = build("llama").to(dtype)
    params = SamplingParams(max_new_tokens=2, temperature=0.0)
    expected = step_by_step(lambda: HybridEngine(model).generate(prompts, params))
    found = HybridEngine(model).generate(prompts, params)
    same = found.tokens == expected.tokens
    assert same.float().mean() > 0.8
    gap = (found.logprobs - expected.logprobs)[same].abs().max()
    assert gap < 40 * torch.finfo(dtype).eps


def test_threads_change_no_token(build, prompts) -> None:
    engine = HybridEngine(build("llama", hidden_size=240, intermediate_size=2048, vocab_size=9000))
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(engine.generate(prompts, PARAMS["top_p"]))
    finally:
        torch.set_num_threads(threads)
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


def test_weights_that_are_not_finite_are_an_error(build, prompts) -> None:
    model = build("llama")
    engine = HybridEngine(model)
    with engine.rollout():
        loop = engine.start(prompts, PARAMS["sampled"])
        loop.step()
        model.model.norm.weight.data.fill_(float("nan"))
        with pytest.raises(RuntimeError, match="NaN"):
            loop.step(MOST_STEPS)


def test_what_the_native_call_does_not_serve_is_said(build, step_by_step) -> None:
    model = build("llama")
    engine = HybridEngine(model)
    with engine.rollout():
        loop: GenerationLoop = engine.start([[1, 5]], PARAMS["greedy"])
        assert loop.why_step_by_step is None
        loop = step_by_step(lambda: engine.start([[1, 5]], PARAMS["greedy"]))
        assert loop.why_step_by_step == "not wanted"
        assert loop.program is None


WITHOUT_KERNELS = """
import json, torch
from transformers import LlamaConfig, LlamaForCausalLM
from hybrid_engine import HybridEngine, SamplingParams
torch.manual_seed(0)
config = LlamaConfig(vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=2,
                     num_attention_heads=6, num_key_value_heads=2, head_dim=16)
model = LlamaForCausalLM(config).eval()
params = SamplingParams(max_new_tokens=24, top_p=0.9, seed=3, stop_token_ids=())
print(json.dumps(HybridEngine(model).generate([[1, 5, 9], [1, 7]], params).tokens.tolist()))
"""


def test_without_native_code_the_tokens_are_the_same() -> None:
    found = {
        policy: subprocess.run(
            [sys.executable, "-c", WITHOUT_KERNELS], capture_output=True, text=True, check=True,
            env={**os.environ, "HYBRID_ENGINE_NATIVE": policy, "HYBRID_ENGINE_CHECK": "0"},
        ).stdout
        for policy in ("off", "require")
    }  # fmt: skip
    assert found["off"].strip()
    assert found["off"] == found["require"]


def test_tensors_without_a_place_are_refused(build) -> None:
    model: Any = build("llama")
    decoder = Decoder(model, find_family(model))
    decoder.refresh()
    cache = KVCache(
        layers=2, num_blocks=2, kv_heads=2, block_size=4, head_dim=16, dtype=torch.float32,
        device=torch.device("cpu"),
    )  # fmt: skip
    model.model.norm.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"contiguous torch\.float32"):
        DecodeProgram(decoder, cache)
