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

import hybrid_engine as he
from hybrid_engine.models import FAMILIES
from hybrid_engine.models import family as families

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


class Unknown:
    """A logits processor that the engine cannot know."""

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores


FALLBACKS: dict[str, tuple[dict[str, Any], str]] = {
    "beams": ({"num_beams": 2}, "beam search"),
    "scores": ({"return_dict_in_generate": True, "output_scores": True}, "output_scores"),
    "processor": ({"logits_processor": [Unknown()]}, "logits processor Unknown"),
    "max_time": ({"max_time": 100.0}, "stopping criterion MaxTimeCriteria"),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_is_not_served_goes_to_hf_and_says_so_once(model: Any, name: str) -> None:
    options, reason = FALLBACKS[name]
    expected = model.generate(IDS, do_sample=False, **OPTIONS, **options)
    he.accelerate(model)
    with pytest.warns(RuntimeWarning, match=reason):
        output = model.generate(IDS, do_sample=False, **OPTIONS, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        model.generate(IDS, do_sample=False, **OPTIONS, **options)
    tokens = output if isinstance(output, torch.Tensor) else output.sequences
    reference = expected if isinstance(expected, torch.Tensor) else expected.sequences
    assert torch.equal(tokens, reference)
    state = he.acceleration(model)
    assert state is not None
    assert state.served == 0
    assert list(state.fallbacks.values()) == [2]


def test_active_dropout_goes_to_hf(build) -> None:
    model = he.accelerate(build("gpt2", attn_pdrop=0.1))
    model.train()
    with pytest.warns(RuntimeWarning, match="dropout is active"):
        model.generate(IDS, do_sample=False, **OPTIONS)
    model.eval().generate(IDS, do_sample=False, **OPTIONS)
    assert served(model) == 1


def test_autocast_goes_to_hf(model: Any) -> None:
    he.accelerate(model)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.warns(RuntimeWarning, match="autocast"),
    ):
        model.generate(IDS, do_sample=False, **OPTIONS)


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


def test_broken_table_is_caught(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gate and up exchanged: fluent, wrong, and seen from the first layer on."""
    up, gate = reversed(families.LLAMA.mlp_up)
    broken = dataclasses.replace(families.LLAMA, mlp_up=(up, gate))
    monkeypatch.setitem(FAMILIES, "llama", broken)
    expected = model.generate(IDS, do_sample=False, **OPTIONS)
    cls = type(model)
    with pytest.warns(RuntimeWarning, match="self-check failed.*from layer 0"):
        he.accelerate(model)
    assert type(model) is cls
    assert torch.equal(model.generate(IDS, do_sample=False, **OPTIONS), expected)


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
