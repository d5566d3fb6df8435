"""Each mistake has its message, and the engine goes on as if it had not been made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    GPTJConfig,
    GPTJForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
)

from hybrid_engine import EngineConfig, HybridEngine, SamplingParams

GREEDY = SamplingParams(max_new_tokens=8, temperature=0.0)


@pytest.fixture
def engine(build) -> HybridEngine:
    return HybridEngine(build("llama"))


def assert_usable(engine: HybridEngine, build: Callable[..., nn.Module]) -> None:
    """The next call gives what an engine that saw no mistake gives."""
    expected = HybridEngine(build("llama")).generate([[1, 5, 9]], GREEDY)
    assert torch.equal(engine.generate([[1, 5, 9]], GREEDY).tokens, expected.tokens)
    with engine.rollout():  # would raise if the failed call had left the engine in rollout
        pass


BAD_PROMPTS = {
    "empty": ([[1], []], "prompt 1 is empty"),
    "too-long": ([[1] * 121], "prompt 0 has 121 tokens.*max_new_tokens=8.*128 positions.*120"),
    "above-vocabulary": ([[1, 97]], r"prompt 0 has token ids outside \[0, 97\)"),
    "negative": ([[1], [3, -1, 5]], r"prompt 1 has token ids outside \[0, 97\)"),
}


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_prompt(engine: HybridEngine, build, name: str) -> None:
    prompts, message = BAD_PROMPTS[name]
    with pytest.raises(ValueError, match=message):
        engine.generate(prompts, GREEDY)
    with pytest.raises(ValueError, match=message.replace("prompt 1", "prompt 0")):
        list(engine.stream(prompts[-1], GREEDY))
    assert_usable(engine, build)


def test_longest_prompt_is_served(engine: HybridEngine) -> None:
    assert engine.generate([[1] * 120], GREEDY).lengths.tolist() == [8]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(engine: HybridEngine, build, value: float) -> None:
    """A training that diverged is said, not sampled from."""
    model = engine._model
    with torch.no_grad():
        kept = model.lm_head.weight.clone()
        model.lm_head.weight[5] = value
    with pytest.raises((ValueError, RuntimeError), match=r"NaN|finite"):
        engine.generate([[1, 5, 9], [1]], GREEDY)
    with torch.no_grad():
        model.lm_head.weight.copy_(kept)
    assert_usable(engine, build)


def test_cache_limit_below_the_longest_sequence(build) -> None:
    engine = HybridEngine(build("llama"), EngineConfig(max_cache_gb=1e-5))
    with pytest.raises(ValueError, match=r"max_cache_gb=1e-05 holds 1 blocks.*needs 3"):
        engine.generate([[1] * 40], GREEDY)
    assert_usable(engine, build)


def test_second_flip(engine: HybridEngine, build) -> None:
    with engine.rollout(), pytest.raises(RuntimeError, match="entered already"), engine.rollout():
        pass
    assert_usable(engine, build)


def test_exception_inside_a_rollout_ends_it(engine: HybridEngine, build) -> None:
    def fail() -> None:
        with engine.rollout():
            engine.generate([[1, 2]], GREEDY)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert_usable(engine, build)
    assert engine._cache is None


def gptj() -> nn.Module:
    return GPTJForCausalLM(GPTJConfig(n_embd=16, n_layer=1, n_head=2, rotary_dim=4, vocab_size=32))


MODELS: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "family": (lambda build: gptj(), "'gptj'; it knows bloom, gemma2"),
    "no-config": (lambda build: nn.Linear(2, 2), "'Linear'; it knows bloom, gemma2"),
    "opt-350m-norm": (
        lambda build: build("opt", do_layer_norm_before=False),
        "this opt model.*do_layer_norm_before",
    ),
    "opt-350m-embedding": (
        lambda build: build("opt", word_embed_proj_dim=24),
        "this opt model.*word_embed_proj_dim",
    ),
    "opt-no-final-norm": (
        lambda build: build("opt", _remove_final_layer_norm=True),
        "this opt model.*_remove_final_layer_norm",
    ),
    "opt-plain-norms": (
        lambda build: build("opt", layer_norm_elementwise_affine=False),
        "this opt model.*layer_norm_elementwise_affine",
    ),
    "no-head": (lambda build: LlamaModel(build("llama").config), "LlamaModel has no language"),
    "classifier": (
        lambda build: LlamaForSequenceClassification(build("llama").config),
        "LlamaForSequenceClassification has no language",
    ),
    "activation": (
        lambda build: build("llama", hidden_act="tanh"),
        "no kernel for the activation 'tanh'",
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_model_that_is_not_served(build, name: str) -> None:
    make, message = MODELS[name]
    with pytest.raises(ValueError, match=message):
        HybridEngine(make(build))


OPTIONS: list[tuple[type, dict[str, Any]]] = [
    (SamplingParams, {"max_new_tokens": 0}),
    (SamplingParams, {"temperature": -0.1}),
    (SamplingParams, {"top_k": -1}),
    (SamplingParams, {"top_p": 0.0}),
    (SamplingParams, {"top_p": 1.1}),
    (SamplingParams, {"min_p": -0.1}),
    (SamplingParams, {"seed": -1}),
    (SamplingParams, {"seed": 2**31}),
    (EngineConfig, {"max_running": 0}),
    (EngineConfig, {"block_size": 0}),
    (EngineConfig, {"max_prefill_tokens": 0}),
    (EngineConfig, {"max_cache_gb": 0.0}),
]


@pytest.mark.parametrize(("kind", "option"), OPTIONS, ids=lambda x: str(x))
def test_option_out_of_range(kind: type, option: dict[str, Any]) -> None:
    ((name, value),) = option.items()
    with pytest.raises(ValueError, match=f"{name} must be .*{value}"):
        kind(**option)
