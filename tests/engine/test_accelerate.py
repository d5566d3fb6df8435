"""HF's own `generate`, accelerated: same tokens, same options, and no trace after `restore`."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    T5Config,
    T5ForConditionalGeneration,
)

import hybrid_engine as he
from hybrid_engine.models import FAMILIES
from hybrid_engine.speedup import plain_generation
from rlhf.data import train_tokenizer

IDS = torch.tensor([[0, 0, 1, 5, 9], [1, 7, 20, 21, 22]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
OPTIONS = {"attention_mask": MASK, "max_new_tokens": 12}


@pytest.fixture
def model(build) -> Any:
    return build("llama")


def served(model: nn.Module) -> int:
    state = he.acceleration(model)
    assert state is not None
    return state.served


GREEDY: dict[str, dict[str, Any]] = {
    "plain": {},
    "eos": {"eos_token_id": list(range(0, 97, 7))},
    "min_new_tokens": {"eos_token_id": list(range(0, 97, 3)), "min_new_tokens": 6},
    "min_length": {"eos_token_id": list(range(0, 97, 3)), "min_length": 9},
    "max_length": {"max_new_tokens": None, "max_length": 11},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "min_p": {"do_sample": True, "min_p": 1.0},
    "top_p": {"do_sample": True, "top_p": 1e-6, "temperature": 0.7},
    "renormalize": {"renormalize_logits": True, "remove_invalid_values": True},
    "eos_out_of_vocabulary": {"eos_token_id": 50_000},
    "pad_is_eos": {"eos_token_id": list(range(0, 97, 7)), "pad_token_id": 7},
    "static_cache": {"cache_implementation": "static"},
    "position_ids": {"position_ids": torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]])},
    "num_return_sequences": {"do_sample": True, "top_k": 1, "num_return_sequences": 3},
}


@pytest.mark.parametrize("name", GREEDY)
def test_tokens_are_those_of_hf(model: Any, name: str) -> None:
    options = {"do_sample": False, **OPTIONS, **GREEDY[name]}
    expected = model.generate(IDS, **options)
    he.accelerate(model)
    assert torch.equal(model.generate(IDS, **options), expected)
    assert served(model) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_its_self_check(build, family: str) -> None:
    model = he.accelerate(build(family))
    state = he.acceleration(model)
    assert state is not None
    assert state.check.passed
    assert state.check.tokens_compared == 12
    assert state.check.max_logit_error < 1e-4


def test_sampling_follows_the_global_seed(model: Any) -> None:
    he.accelerate(model)
    options = {"do_sample": True, "top_p": 0.9, "temperature": 1.3, **OPTIONS}
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(model.generate(IDS, **options))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_sampling_is_from_the_distribution_of_hf(model: Any) -> None:
    """All parameters at once: each token's log-prob is that of HF's processors' scores.

    Without padding, which HF's repetition penalty takes for tokens that were said.
    """
    ids = torch.tensor([[1, 5, 9, 30, 31], IDS[1].tolist()])
    he.accelerate(model)
    torch.manual_seed(3)
    options = {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.02,
               "repetition_penalty": 1.2, "min_new_tokens": 4,
               "eos_token_id": list(range(0, 97, 9))}  # fmt: skip
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=True,
        num_return_sequences=16, return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip
    assert served(model) == 1
    theirs = model.compute_transition_scores(output.sequences, output.scores, normalize_logits=True)
    stops = tuple(options.pop("eos_token_id"))
    torch.manual_seed(3)
    seed = int(torch.randint(2**31 - 1, ()))  # as the accelerated call drew it
    params = he.SamplingParams(max_new_tokens=12, n=16, seed=seed, stop_token_ids=stops, **options)
    rollout = he.HybridEngine(model).generate(ids.tolist(), params)
    mine = rollout.truncated_logprobs
    inside = torch.arange(mine.shape[1]) < rollout.lengths.unsqueeze(1)
    assert torch.equal(torch.where(inside, rollout.tokens, 0), output.sequences[:, 5:])
    torch.testing.assert_close(mine[inside], theirs[inside], rtol=1e-3, atol=1e-3)
    assert inside.sum() > 32 * 4


def test_sampled_tokens_stay_inside_top_k(model: Any) -> None:
    he.accelerate(model)
    torch.manual_seed(0)
    output = model.generate(IDS[1:], do_sample=True, top_k=2, num_return_sequences=64,
                            max_new_tokens=1)  # fmt: skip
    allowed = model(IDS[1:]).logits[0, -1].topk(2).indices.tolist()
    assert set(output[:, -1].tolist()) == set(allowed)


def test_return_dict(model: Any) -> None:
    he.accelerate(model)
    output = model.generate(IDS, do_sample=False, return_dict_in_generate=True, **OPTIONS)
    assert torch.equal(output.sequences, model.generate(IDS, do_sample=False, **OPTIONS))


SCORED = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_hf(build, family: str) -> None:
    model = build(family)
    options = {**SCORED, **OPTIONS, "repetition_penalty": 1.3, "min_new_tokens": 6,
               "eos_token_id": list(range(0, 97, 5)), "do_sample": False}  # fmt: skip
    theirs = model.generate(IDS, **options)
    he.accelerate(model)
    mine = model.generate(IDS, **options)
    assert served(model) == 1
    assert torch.equal(mine.sequences, theirs.sequences)
    assert len(mine.scores) == len(theirs.scores) == mine.sequences.shape[1] - 5
    for name in ("scores", "logits"):
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-4, atol=1e-4)
    assert list(mine.keys()) == ["sequences", "scores", "logits"]
    transition = model.compute_transition_scores(mine.sequences, mine.scores)
    expected = model.compute_transition_scores(theirs.sequences, theirs.scores)
    torch.testing.assert_close(transition, expected, rtol=1e-4, atol=1e-4)


def test_scores_cost_nothing_until_they_are_read(model: Any, monkeypatch) -> None:
    he.accelerate(model)
    forwards: list[int] = []
    model.model.register_forward_hook(lambda *_: forwards.append(1))
    output = model.generate(IDS, do_sample=False, **SCORED, **OPTIONS)
    assert torch.equal(output.sequences, model.generate(IDS, do_sample=False, **OPTIONS))
    assert not forwards
    assert output.scores is output.scores
    assert len(forwards) == 1
    assert len(output.to_tuple()) == 3


@pytest.mark.parametrize("view", ["keys", "values", "items", "to_tuple", "__iter__", "[1]"])
def test_no_view_of_the_output_misses_the_scores(model: Any, view: str) -> None:
    he.accelerate(model)
    output = model.generate(
        IDS, do_sample=False, return_dict_in_generate=True, output_scores=True, **OPTIONS
    )
    if view == "[1]":
        assert len(output[1]) == 12
    else:
        assert len(list(getattr(output, view)())) == 2


def test_scores_of_other_weights_are_refused(model: Any) -> None:
    he.accelerate(model)
    output = model.generate(IDS, do_sample=False, **SCORED, **OPTIONS)
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="weights have changed since this generation"):
        _ = output.scores


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["the cat sat on the mat", "a list of words"] * 4, vocab_size=290)


def test_stop_strings_are_those_of_hf(build, tokenizer: Any) -> None:
    model = build("llama", vocab_size=len(tokenizer))
    for token in range(len(tokenizer)):
        if len(tokenizer.decode([token])) == 1 or token < 10:  # a byte, a special token
            model.lm_head.weight.data[token] = 0.0
    options = {"do_sample": False, **OPTIONS, "max_new_tokens": 24}
    free = model.generate(IDS, **options)
    stops = [tokenizer.decode(free[i, 10:11]) for i in range(2)]
    options |= {"stop_strings": stops, "tokenizer": tokenizer}
    expected = model.generate(IDS, **options)
    assert expected.shape[1] < free.shape[1]
    he.accelerate(model)
    assert torch.equal(model.generate(IDS, **options), expected)
    assert served(model) == 1


BATCH = [[1, 5, 9], [1, 7, 20, 21, 22], [1]]


@pytest.mark.parametrize("eos", [None, list(range(0, 97, 7))], ids=["free", "eos"])
def test_generate_batch(model: Any, eos: list[int] | None) -> None:
    config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=eos, pad_token_id=0)
    expected = []
    for prompt in BATCH:
        ids = torch.tensor([prompt])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        expected.append(output[0, len(prompt) :].tolist())
    he.accelerate(model)
    outputs = model.generate_batch(BATCH, generation_config=config, progress_bar=False)
    assert list(outputs) == ["req_0", "req_1", "req_2"]
    assert [output.generated_tokens for output in outputs.values()] == expected
    assert [output.prompt_ids for output in outputs.values()] == BATCH
    assert all(output.is_finished() and output.logprobs == [] for output in outputs.values())
    assert served(model) == 1


def test_generate_batch_samples_with_logprobs(model: Any) -> None:
    config = GenerationConfig(max_new_tokens=6, do_sample=True, num_return_sequences=3, top_k=5)
    he.accelerate(model)
    torch.manual_seed(0)
    outputs = model.generate_batch(
        BATCH, generation_config=config,
        continuous_batching_config=ContinuousBatchingConfig(return_logprobs=True),
    )  # fmt: skip
    assert len(outputs) == 9
    assert len({tuple(output.generated_tokens) for output in outputs.values()}) == 9
    for output in outputs.values():
        with torch.no_grad():
            logits = model(torch.tensor([output.prompt_ids + output.generated_tokens])).logits[0]
        kept = logits[len(output.prompt_ids) - 1 : -1].topk(5).values.logsumexp(-1)
        chosen = logits[len(output.prompt_ids) - 1 : -1].gather(
            1, torch.tensor(output.generated_tokens)[:, None]
        )
        torch.testing.assert_close(
            torch.tensor(output.logprobs), chosen[:, 0] - kept, rtol=1e-3, atol=1e-3
        )


class Unknown:
    """A logits processor that the engine cannot know."""

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


FALLBACKS: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, "beam search"),
    "sampled_beams": ({"num_beams": 2, "do_sample": True, "top_k": 1}, "beam search"),
    "prompt_lookup": ({"prompt_lookup_num_tokens": 3}, "assisted decoding"),
    "hidden_states": (
        {"return_dict_in_generate": True, "output_hidden_states": True},
        "output_hidden_states",
    ),
    "no_repeat_ngram": ({"no_repeat_ngram_size": 2}, "logits processor NoRepeatNGram"),
    "processor": ({"logits_processor": [Unknown()]}, "logits processor Unknown"),
    "positions": ({"max_new_tokens": 124}, "may need 129 positions of 128"),
    "inputs_embeds": ({"inputs_embeds": torch.ones(1, 5, 48)}, "model argument inputs_embeds"),
    "max_time": ({"max_time": 100.0}, "stopping criterion MaxTimeCriteria"),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_is_not_served_goes_to_hf_and_says_so_once(model: Any, name: str) -> None:
    options, reason = FALLBACKS[name]
    options = {"attention_mask": MASK[1:], "max_new_tokens": 12, "do_sample": False, **options}
    expected = model.generate(IDS[1:], **options)
    he.accelerate(model)
    with pytest.warns(RuntimeWarning, match=reason):
        output = model.generate(IDS[1:], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model.generate(IDS[1:], **options)
    tokens = output if isinstance(output, torch.Tensor) else output.sequences
    reference = expected if isinstance(expected, torch.Tensor) else expected.sequences
    assert torch.equal(tokens, reference)
    state = he.acceleration(model)
    assert state is not None
    assert state.served == 0
    assert list(state.fallbacks.values()) == [2]


def test_assistant_model_goes_to_hf(model: Any, build) -> None:
    options = {"do_sample": False, "attention_mask": MASK[1:], "max_new_tokens": 12}
    expected = model.generate(IDS[1:], **options)
    he.accelerate(model)
    with pytest.warns(RuntimeWarning, match="assisted decoding"):
        found = model.generate(IDS[1:], assistant_model=build("llama"), **options)
    assert torch.equal(found, expected)


def test_active_dropout_goes_to_hf(build) -> None:
    model = he.accelerate(build("gpt2", attn_pdrop=0.1))
    model.train()
    with pytest.warns(RuntimeWarning, match="dropout is active"):
        model.generate(IDS, do_sample=False, **OPTIONS)
    model.eval().generate(IDS, do_sample=False, **OPTIONS)
    assert served(model) == 1


@pytest.mark.parametrize("family", ["opt", "gpt_neox", "bloom", "llama"])
def test_dropout_without_a_dropout_module_goes_to_hf(build, family: str) -> None:
    """OPT and others keep a rate and call functional dropout."""
    rates = {"llama": "attention_dropout", "opt": "dropout", "bloom": "hidden_dropout"}
    model = he.accelerate(build(family, **{rates.get(family, "hidden_dropout"): 0.1})).train()
    with pytest.warns(RuntimeWarning, match="dropout is active"):
        model.generate(IDS, do_sample=False, **OPTIONS)


def test_own_position_ids_go_to_hf(model: Any) -> None:
    positions = torch.tensor([[0, 0, 5, 6, 7], [2, 3, 4, 5, 6]])
    expected = model.generate(IDS, position_ids=positions, do_sample=False, **OPTIONS)
    he.accelerate(model)
    with pytest.warns(RuntimeWarning, match="position_ids of its own"):
        found = model.generate(IDS, position_ids=positions, do_sample=False, **OPTIONS)
    assert torch.equal(found, expected)


def test_a_layer_that_is_changed_later_goes_to_hf(model: Any) -> None:
    """As an adapter of an unknown kind: it is never ignored, and the script goes on."""

    class Doubled(nn.Module):
        def __init__(self, wrapped: nn.Module) -> None:
            super().__init__()
            self.wrapped = wrapped

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * self.wrapped(x)

    he.accelerate(model)
    model.model.layers[1].mlp.down_proj = Doubled(model.model.layers[1].mlp.down_proj)
    with pytest.warns(RuntimeWarning, match="own loop.*found Doubled"):
        found = model.generate(IDS, do_sample=False, **OPTIONS)
    assert served(model) == 0
    with plain_generation(model):
        assert torch.equal(model.generate(IDS, do_sample=False, **OPTIONS), found)
    model.model.layers[1].mlp.down_proj = model.model.layers[1].mlp.down_proj.wrapped
    model.generate(IDS, do_sample=False, **OPTIONS)
    assert served(model) == 1


def test_a_call_inside_an_open_rollout(model: Any) -> None:
    he.accelerate(model)
    expected = model.generate(IDS, do_sample=False, **OPTIONS)
    with he.acceleration(model).engine.rollout():  # type: ignore[union-attr]
        assert torch.equal(model.generate(IDS, do_sample=False, **OPTIONS), expected)
    assert served(model) == 2


def test_encoder_decoder_stays_with_hf() -> None:
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config)
    with pytest.warns(RuntimeWarning, match="T5.* is not accelerated.*'t5'"):
        he.accelerate(model)
    assert he.acceleration(model) is None


def test_autocast_generates_in_its_type(model: Any) -> None:
    """The weights stay in fp32; the engine's are a copy in bf16, as autocast's own are."""
    he.accelerate(model)
    plain = model.generate(IDS, do_sample=False, **OPTIONS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model.generate(IDS, do_sample=False, **OPTIONS)
        output = model.generate(
            IDS, do_sample=False, return_dict_in_generate=True, output_logits=True, **OPTIONS
        )
        scores = model(found[:, :-1], attention_mask=(found > 0)[:, :-1].long()).logits
    engine = he.HybridEngine(he.restore(model), he.EngineConfig(dtype="bfloat16"))
    prompts = [[1, 5, 9], IDS[1].tolist()]
    expected = engine.generate(prompts, he.SamplingParams(max_new_tokens=12, temperature=0.0))
    assert torch.equal(found[:, 5:], expected.tokens)
    assert not torch.equal(found, plain)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    first = scores[1, 4].float()  # the same logits as under autocast, not those in fp32
    assert torch.equal(output.logits[0][1], first)


def test_engine_ignores_an_autocast_of_another_type(build) -> None:
    engine = he.HybridEngine(build("llama"))
    params = he.SamplingParams(max_new_tokens=12, temperature=0.0)
    expected = engine.generate([[1, 5, 9]], params)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(engine.generate([[1, 5, 9]], params).logprobs, expected.logprobs)
        assert list(engine.stream([1, 5, 9], params)) == expected.response(0)


def test_deepcopy_generates_with_its_own_weights(model: Any) -> None:
    he.accelerate(model)
    before = model.generate(IDS, do_sample=False, **OPTIONS)
    duplicate = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in duplicate.parameters():
            parameter.mul_(-0.7)
    other = duplicate.generate(IDS, do_sample=False, **OPTIONS)
    assert served(duplicate) == 1
    assert torch.equal(other, he.restore(duplicate).generate(IDS, do_sample=False, **OPTIONS))
    assert torch.equal(model.generate(IDS, do_sample=False, **OPTIONS), before)
    assert not torch.equal(before, other)


def test_pickle_and_save_are_those_of_the_plain_model(model: Any, tmp_path) -> None:
    plain = type(model)
    expected = model.generate(IDS, do_sample=False, **OPTIONS)
    he.accelerate(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert type(loaded) is plain
    assert torch.equal(loaded.generate(IDS, do_sample=False, **OPTIONS), expected)
    model.save_pretrained(tmp_path)
    assert torch.equal(
        plain.from_pretrained(tmp_path).generate(IDS, do_sample=False, **OPTIONS), expected
    )


def test_restore_leaves_no_trace(model: Any) -> None:
    cls, attributes = type(model), set(vars(model))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    he.accelerate(model)
    assert type(model).__name__ == cls.__name__
    assert isinstance(model, cls)
    model.generate(IDS, do_sample=False, **OPTIONS)
    he.restore(model)
    assert type(model) is cls
    assert set(vars(model)) == attributes
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    storages = [p.untyped_storage().data_ptr() for p in model.parameters()]
    assert len(storages) == len(set(storages))
    assert he.acceleration(model) is None
    assert he.restore(model) is model


def test_accelerating_twice_is_accelerating_once(model: Any) -> None:
    he.accelerate(model)
    state = he.acceleration(model)
    assert he.acceleration(he.accelerate(model)) is state


def test_wrapped_model(model: Any) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    wrapper = Wrapper(model)
    assert he.accelerate(wrapper) is wrapper
    model.generate(IDS, do_sample=False, **OPTIONS)
    assert served(wrapper) == 1


BROKEN: dict[str, tuple[str, dict[str, Any], str]] = {
    "gate-and-up": ("llama", {"mlp_up": ("mlp.up_proj", "mlp.gate_proj")}, "from layer 0 on"),
    "keys-and-values": (
        "llama",
        {"qkv": ("self_attn.q_proj", "self_attn.v_proj", "self_attn.k_proj")},
        "from layer 0 on",
    ),
    "norms": (
        "llama",
        {"attention_norm": "post_attention_layernorm", "mlp_norm": "input_layernorm"},
        "from layer 0 on",
    ),
    "norm-offset": ("gemma2", {"norm_weight_offset": 0.0}, "from layer 0 on"),
    "activation": ("gpt2", {"activation": lambda config: "relu"}, "from layer 0 on"),
    "positions": ("opt", {"position_offset": 1}, "from layer 0 on"),
    "second-layer-window": (
        "mistral",
        {"window": lambda config, layer: 4 * (layer == 1)},
        "from layer 1 on",
    ),
    "no-such-layer-part": ("llama", {"mlp_down": "mlp.down"}, "LlamaDecoderLayer has no mlp.down"),
    "no-such-part": ("llama", {"rotary": "rotary"}, "LlamaForCausalLM has no rotary"),
    "final-norm": ("llama", {"final_norm": "model.layers.0.input_layernorm"}, "after the last"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_table_is_caught(build, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Fluent, wrong, and seen from the layer on that goes wrong; HF's own loop stays."""
    family, fields, where = BROKEN[name]
    model = build(family, **({"sliding_window": None} if family == "mistral" else {}))
    expected = model.generate(IDS, do_sample=False, **OPTIONS)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    monkeypatch.setitem(FAMILIES, family, dataclasses.replace(FAMILIES[family], **fields))
    cls = type(model)
    with pytest.warns(RuntimeWarning, match=f"is not accelerated.*{where}"):
        he.accelerate(model)
    assert type(model) is cls
    assert he.acceleration(model) is None
    assert torch.equal(model.generate(IDS, do_sample=False, **OPTIONS), expected)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_self_check_passes_in_fewer_bits(build, family: str, dtype: str) -> None:
    """Weights of that type, and weights in fp32 with rollouts of that type."""
    for model, config in (
        (build(family).to(getattr(torch, dtype)), None),
        (build(family), he.EngineConfig(dtype=dtype)),
    ):
        state = he.acceleration(he.accelerate(model, config))
        assert state is not None
        assert state.check.passed


def test_speedup_is_measured_on_both_loops(model: Any) -> None:
    he.accelerate(model).train()
    assert he.measure_speedup(model, repeats=2, new_tokens=8) > 0
    assert served(model) == 3  # and as many on HF's loop
    assert model.training


def test_unknown_family_stays_with_hf() -> None:
    with pytest.warns(RuntimeWarning, match="not accelerated.*does not know"):
        he.accelerate(nn.Linear(2, 2))


def test_deepspeed_chat_call(model: Any) -> None:
    """The shape of the call that a step-3 script makes on the unwrapped module."""
    options = {"max_length": IDS.shape[1] + 8, "pad_token_id": 0, "synced_gpus": False}
    expected = model.generate(IDS, attention_mask=MASK, do_sample=False, **options)
    he.accelerate(model)
    output = model.generate(IDS, attention_mask=MASK, do_sample=False, **options)
    assert torch.equal(output, expected)
    assert served(model) == 1
