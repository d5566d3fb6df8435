"""Copies, pickles, wrappers and `restore` of an accelerated model, and the self-check before."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn

import hybrid_engine as he
from hybrid_engine.models import FAMILIES
from tests.engine.accelerated import IDS, OPTIONS, served


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_its_self_check(build, family: str) -> None:
    model = he.accelerate(build(family))
    state = he.acceleration(model)
    assert state is not None
    assert state.check.passed
    assert state.check.tokens_compared == 12
    assert state.check.max_logit_error < 1e-4


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


def test_an_accelerated_model_can_be_freed(build) -> None:
    model = he.accelerate(build("llama"))
    model.generate(IDS, do_sample=False, **OPTIONS)
    weight = weakref.ref(model.lm_head.weight)
    del model
    gc.collect()
    assert weight() is None


def test_every_module_keeps_its_mode(model: Any) -> None:
    model.train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    he.accelerate(model)
    he.measure_speedup(model, batch=1, prompt_tokens=1, new_tokens=1, repeats=1)
    assert [module.training for module in model.modules()] == modes


def test_accelerating_under_autocast(model: Any) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        he.accelerate(model)
    state = he.acceleration(model)
    assert state is not None
    assert state.check.passed


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


def test_compiled_model(model: Any) -> None:
    compiled: Any = he.accelerate(torch.compile(model, backend="eager"))
    compiled.generate(IDS, do_sample=False, **OPTIONS)
    assert served(compiled) == 1


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
