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
    "long-prompt-in-a-batch": ([[1], [1] * 300], "prompt 1 has 300 tokens"),
    "text": ([[1], "hello"], "prompt 1 must be a list of token ids, got str: tokenize"),
    "tensor": ([[1], torch.tensor([1, 2])], "prompt 1 must be a list.* got Tensor.*tolist"),
    "floats": ([[1], [1.0, 2.0]], "prompt 1 must be a list of token ids"),
    "above-vocabulary": ([[1, 97]], r"prompt 0 has token ids outside \[0, 97\)"),
    "no-int64": ([[1, 2**70]], r"prompt 0 has token ids outside \[0, 97\)"),
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


@pytest.mark.parametrize("new_tokens", [128, 500])
def test_no_room_for_a_prompt(engine: HybridEngine, new_tokens: int) -> None:
    message = rf"max_new_tokens={new_tokens} must be below 128: the model's 128 positions"
    with pytest.raises(ValueError, match=message):
        engine.generate([[1]], SamplingParams(max_new_tokens=new_tokens))


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


def test_nan_everywhere(build) -> None:
    """NaN in a layer, not in the head: it arrives in the logits of all."""
    model = build("llama")
    engine = HybridEngine(model)
    kept = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    model.model.layers[0].mlp.up_proj.weight.data.fill_(float("nan"))
    with pytest.raises((ValueError, RuntimeError), match="NaN"):
        engine.generate([[1, 5, 9]], GREEDY)
    model.model.layers[0].mlp.up_proj.weight.data.copy_(kept)
    assert_usable(engine, build)


def test_pad_that_is_eos(engine: HybridEngine, hf_greedy) -> None:
    """The stop token is kept once, and what follows is padding by length, whatever its number."""
    model = engine._model
    stop = engine.generate([[1, 5, 9]], GREEDY).response(0)[3]
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = stop
    rollout = engine.generate([[1, 5, 9], [1]], GREEDY)
    assert rollout.response(0) == hf_greedy(model, [1, 5, 9], 8)
    assert rollout.response(0)[-1] == stop
    assert rollout.response(1) == hf_greedy(model, [1], 8)
    assert (rollout.tokens[0, int(rollout.lengths[0]) :] == stop).all()


def test_eos_that_never_comes(engine: HybridEngine) -> None:
    """Max_new_tokens ends the response; an eos past the head's rows can never be said."""
    model = engine._model
    free = engine.generate([[1, 5, 9]], GREEDY)
    unsaid = next(token for token in range(97) if token not in free.response(0))
    for eos in (unsaid, 50_256, [unsaid, 50_256]):
        model.generation_config.eos_token_id = eos
        rollout = engine.generate([[1, 5, 9]], GREEDY)
        assert torch.equal(rollout.tokens, free.tokens)
        assert rollout.finish_reasons == ["length"]


def test_stop_token_outside_the_head(engine: HybridEngine, build) -> None:
    with pytest.raises(ValueError, match=r"stop_token_ids \[97, -1\] are outside.*\[0, 97\)"):
        engine.generate([[1]], SamplingParams(max_new_tokens=8, stop_token_ids=(3, 97, -1)))
    assert_usable(engine, build)


def resized_head(model: Any, rows: int) -> Any:
    weight = torch.randn(rows, 48, generator=torch.Generator().manual_seed(3))
    model.lm_head = nn.Linear(48, rows, bias=False)
    model.lm_head.weight = nn.Parameter(weight)
    return model


def test_vocabulary_larger_than_the_head(build, hf_greedy) -> None:
    """What the head cannot say is no prompt token either; all else is as in HF."""
    model = resized_head(build("llama"), 90)
    engine = HybridEngine(model)
    assert engine.generate([[1, 89]], GREEDY).response(0) == hf_greedy(model, [1, 89], 8)
    with pytest.raises(ValueError, match=r"outside \[0, 90\), the rows of the model's head"):
        engine.generate([[1, 90]], GREEDY)


def test_head_larger_than_the_vocabulary(build) -> None:
    engine = HybridEngine(resized_head(build("llama"), 128))
    with pytest.raises(ValueError, match="head says 128 tokens, the embedding knows 97"):
        engine.generate([[1, 5]], GREEDY)


def test_seeds_for_other_prompts(engine: HybridEngine) -> None:
    with pytest.raises(ValueError, match="seeds: expected one for each of 2, got 1"):
        engine.generate([[5, 6, 7]] * 2, SamplingParams(max_new_tokens=2), seeds=[0])


def test_a_stream_of_several_responses(engine: HybridEngine, build) -> None:
    with pytest.raises(ValueError, match="one response, got n=2"):
        next(engine.stream([1], SamplingParams(n=2)))
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
    (SamplingParams, {"min_new_tokens": -1}),
    (SamplingParams, {"n": 0}),
    (SamplingParams, {"n": -1}),
    (SamplingParams, {"temperature": -0.1}),
    (SamplingParams, {"temperature": 1e-40}),
    (SamplingParams, {"temperature": float("nan")}),
    (SamplingParams, {"repetition_penalty": float("nan")}),
    (SamplingParams, {"top_p": float("nan")}),
    (SamplingParams, {"min_p": float("nan")}),
    (SamplingParams, {"repetition_penalty": 0.0}),
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
