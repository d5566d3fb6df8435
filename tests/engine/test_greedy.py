"""Greedy tokens in fp32 are those of HF `generate`, token for token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hybrid_engine import HybridEngine, SamplingParams
from hybrid_engine.models import FAMILIES

NEW_TOKENS = 24
GREEDY = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0)


def rope(rope_type: str, **options: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 1e4, **options}}


ORIGINAL = {"original_max_position_embeddings": 32}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, **ORIGINAL}
ONE_SLIDES = {"max_window_layers": 1}
SOFTCAPS = ("attn_logit_softcapping", "final_logit_softcapping")
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-GQA3-D16": ("llama", {}),
    "llama-MHA": ("llama", {"num_key_value_heads": 6}),
    "llama-MQA": ("llama", {"num_key_value_heads": 1}),
    "llama-D8-of-hidden": ("llama", {"head_dim": None}),
    "llama-attention_bias": ("llama", {"attention_bias": True}),
    "llama-mlp_bias": ("llama", {"mlp_bias": True}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-gelu": ("llama", {"hidden_act": "gelu"}),
    "llama-gelu_tanh": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "llama-eps": ("llama", {"rms_norm_eps": 0.1}),
    "llama-theta": ("llama", rope("default", rope_theta=100.0)),
    "llama-rope-linear": ("llama", rope("linear", factor=4.0)),
    "llama-rope-dynamic": ("llama", rope("dynamic", factor=4.0)),
    "llama-rope-llama3": ("llama", rope("llama3", factor=4.0, **LLAMA3)),
    "llama-rope-yarn": ("llama", rope("yarn", factor=4.0, **ORIGINAL)),
    "opt": ("opt", {}),
    "opt-untied": ("opt", {"tie_word_embeddings": False}),
    "opt-no-bias": ("opt", {"enable_bias": False}),
    "opt-gelu": ("opt", {"activation_function": "gelu"}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral-window": ("mistral", {"sliding_window": 8}),
    "qwen2": ("qwen2", {}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 8, **ONE_SLIDES}),
    "qwen3": ("qwen3", {}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"sliding_window": 8, "query_pre_attn_scalar": 24}),
    "gemma2-tied": ("gemma2", {"tie_word_embeddings": True}),
    "gemma2-no-softcap": ("gemma2", dict.fromkeys(SOFTCAPS)),
    "gemma2-softcap": ("gemma2", {"attn_implementation": "eager", **dict.fromkeys(SOFTCAPS, 2.0)}),
    "gpt2": ("gpt2", {}),
    "gpt2-untied": ("gpt2", {"tie_word_embeddings": False}),
    "gpt_neox-partial-rotary": ("gpt_neox", {"rotary_pct": 0.5}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt_neox-no-bias": ("gpt_neox", {"attention_bias": False}),
    "bloom": ("bloom", {}),
    "bloom-8-heads": ("bloom", {"num_attention_heads": 8}),
}


@pytest.mark.parametrize("name", MODELS)
def test_ragged_batch_equals_hf_alone(build, hf_greedy, prompts, name: str) -> None:
    family, options = MODELS[name]
    model = build(family, **options)
    rollout = HybridEngine(model).generate(prompts, GREEDY)
    for i, prompt in enumerate(prompts):
        assert rollout.response(i) == hf_greedy(model, prompt, NEW_TOKENS), f"prompt {i}"
    assert rollout.finish_reasons == ["length"] * len(prompts)


def test_the_models_listen_to_every_token(build, prompts) -> None:
    """If the tests' models ignored their attention, equal tokens would prove nothing."""
    for family in FAMILIES:
        engine = HybridEngine(build(family))
        prompt = prompts[4]
        responses = {tuple(engine.generate([prompt], GREEDY).response(0))}
        for i in range(1, len(prompt)):
            other = [*prompt[:i], 96 - prompt[i], *prompt[i + 1 :]]
            responses.add(tuple(engine.generate([other], GREEDY).response(0)))
        # ALiBi forgets what is far by design: BLOOM hears a quarter, the others nearly all.
        assert len(responses) > (0.25 if family == "bloom" else 0.7) * len(prompt)


def test_longrope_is_refused(build) -> None:
    """Its frequencies change with the length of the sequence, which one table cannot follow."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8}
    model = build("llama", **rope("longrope", factor=4.0, **ORIGINAL, **factors))
    with pytest.raises(ValueError, match="longrope"):
        HybridEngine(model)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_all_positions_up_to_the_last(build, hf_greedy, family: str) -> None:
    model = build(family, max_position_embeddings=32)
    prompt = [1, 5, 9]
    params = SamplingParams(max_new_tokens=29, temperature=0.0)
    response = HybridEngine(model).generate([prompt], params).response(0)
    assert len(response) == 29
    assert response == hf_greedy(model, prompt, 29)


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_eos_list_stops_like_hf(build, hf_greedy, prompts, family: str) -> None:
    model = build(family)
    free = HybridEngine(model).generate(prompts, GREEDY)
    stops = [free.response(0)[3], free.response(4)[10]]
    model.generation_config.eos_token_id = stops
    rollout = HybridEngine(model).generate(prompts, GREEDY)
    for i, prompt in enumerate(prompts):
        assert rollout.response(i) == hf_greedy(model, prompt, NEW_TOKENS), f"prompt {i}"
        stopped = rollout.response(i)[-1] in stops
        assert rollout.finish_reasons[i] == ("stop" if stopped else "length")
    assert rollout.finish_reasons[0] == "stop"
    assert int(rollout.lengths[0]) <= 4


def test_eos_as_the_first_token(build, prompts) -> None:
    model = build("llama")
    first = HybridEngine(model).generate(prompts, GREEDY).response(2)[0]
    params = SamplingParams(max_new_tokens=8, temperature=0.0, stop_token_ids=(first,))
    rollout = HybridEngine(model).generate(prompts, params)
    assert rollout.response(2) == [first]
    assert rollout.finish_reasons[2] == "stop"
    assert torch.equal(rollout.tokens[2, 1:], torch.zeros_like(rollout.tokens[2, 1:]))
    assert torch.equal(rollout.logprobs[2, 1:], torch.zeros_like(rollout.logprobs[2, 1:]))


def test_one_new_token(build, prompts) -> None:
    engine = HybridEngine(build("llama"))
    params = SamplingParams(max_new_tokens=1, temperature=0.0)
    rollout = engine.generate(prompts, params)
    whole = engine.generate(prompts, GREEDY)
    assert rollout.tokens.shape == (len(prompts), 1)
    assert torch.equal(rollout.tokens, whole.tokens[:, :1])


def test_no_prompts(build) -> None:
    rollout = HybridEngine(build("llama")).generate([], GREEDY)
    assert rollout.tokens.shape == (0, 0)
    assert rollout.finish_reasons == []
