"""The step that a CUDA graph records, run on CPU tensors, says what the plain loop says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hybrid_engine import EngineConfig, HybridEngine, SamplingParams
from hybrid_engine.generation import loop
from hybrid_engine.generation.device_step import STEPS_OF_A_POLL, GraphedSteps, bucket_of

PARAMS = {
    "greedy": SamplingParams(max_new_tokens=30, temperature=0.0),
    "top_p": SamplingParams(max_new_tokens=30, top_p=0.8, seed=4),
    "penalty": SamplingParams(max_new_tokens=30, repetition_penalty=1.3, seed=6),
    "min_new_tokens": SamplingParams(max_new_tokens=30, min_new_tokens=9, seed=7),
}
CONFIGS = {
    "all-at-once": EngineConfig(),
    "two-at-a-time": EngineConfig(max_running=2),
    "block3": EngineConfig(block_size=3),
}


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch, step_by_step: Any) -> Any:
    """Calls a function whose rollouts take the graph's steps, one after another."""

    def call(function: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(loop, "graphs_serve", lambda decoder: True)
            patch.setattr(GraphedSteps, "_capture", lambda self, bucket: None)
            return step_by_step(function)

    return call


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", PARAMS)
def test_device_steps_equal_the_loop(
    build, prompts, step_by_step, on_device, name: str, config: str
) -> None:
    model = build("llama")
    model.generation_config.eos_token_id = [2, 9, 33, 40]
    engine = HybridEngine(model, CONFIGS[config])
    expected = step_by_step(lambda: engine.generate(prompts, PARAMS[name]))
    found = on_device(lambda: engine.generate(prompts, PARAMS[name]))
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.lengths, expected.lengths)
    assert found.finish_reasons == expected.finish_reasons
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        found.truncated_logprobs, expected.truncated_logprobs, rtol=1e-4, atol=1e-4
    )
    assert len(set(expected.lengths.tolist())) > 1


def test_the_host_looks_once_a_poll(build, on_device, monkeypatch) -> None:
    calls: list[int] = []
    run = GraphedSteps.run

    def counted(self: GraphedSteps, count: int, most: int) -> None:
        calls.append(count)
        run(self, count, most)

    monkeypatch.setattr(GraphedSteps, "run", counted)
    engine = HybridEngine(build("llama"))
    tokens = 1 + 3 * STEPS_OF_A_POLL  # the prefill gives the first
    params = SamplingParams(max_new_tokens=tokens, stop_token_ids=())
    on_device(lambda: engine.generate([[1, 5], [1, 6, 7]], params))
    assert calls == [2, 2, 2]


def test_buckets() -> None:
    assert [bucket_of(n, 12) for n in (1, 2, 3, 4, 5, 8, 9, 12)] == [1, 2, 4, 4, 8, 8, 12, 12]


@pytest.mark.gpu
@pytest.mark.parametrize("name", PARAMS)
def test_graphs_on_a_gpu_equal_the_loop(build, prompts, monkeypatch, name: str) -> None:
    model = build("llama").cuda()
    model.generation_config.eos_token_id = [2, 9, 33, 40]
    engine = HybridEngine(model)
    found = engine.generate(prompts, PARAMS[name])
    monkeypatch.setattr(loop, "graphs_serve", lambda decoder: False)
    expected = engine.generate(prompts, PARAMS[name])
    assert torch.equal(found.tokens, expected.tokens)
    assert torch.equal(found.lengths, expected.lengths)
