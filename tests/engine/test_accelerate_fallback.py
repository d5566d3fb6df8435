"""What the engine does not serve runs on HF's own loop, and says so."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    T5Config,
    T5ForConditionalGeneration,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import hybrid_engine as he
from hybrid_engine.speedup import plain_generation
from tests.engine.accelerated import IDS, MASK, OPTIONS, served


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
    "positions": ({"max_new_tokens": 124, "do_sample": True}, "may need 129 positions of 128"),
    "own_order": (
        {"do_sample": True, "top_k": 5, "logits_processor": [TopPLogitsWarper(0.9)]},
        "order of their own: TopPLogitsWarper, TopKLogitsWarper",
    ),
    "one_kind_twice": (
        {"do_sample": True, "logits_processor": [TopKLogitsWarper(9), TopKLogitsWarper(3)]},
        "order of their own",
    ),
    "penalty_of_the_response": (
        {"logits_processor": [RepetitionPenaltyLogitsProcessor(1.7, prompt_ignore_length=5)]},
        "ignores the prompt",
    ),
    "tokens_to_keep": (
        {
            "do_sample": True,
            "top_k": 0,
            "logits_processor": [TopPLogitsWarper(0.1, min_tokens_to_keep=3)],
        },
        "min_tokens_to_keep=3",
    ),
    "inputs_embeds": ({"inputs_embeds": torch.ones(1, 5, 48)}, "model argument inputs_embeds"),
    "max_time": ({"max_time": 100.0}, "stopping criterion MaxTimeCriteria"),
}


@pytest.mark.parametrize("name", FALLBACKS)
def test_what_is_not_served_goes_to_hf_and_says_so_once(model: Any, name: str) -> None:
    options, reason = FALLBACKS[name]
    options = {"attention_mask": MASK[1:], "max_new_tokens": 12, "do_sample": False, **options}
    torch.manual_seed(0)
    expected = model.generate(IDS[1:], **options)
    he.accelerate(model)
    torch.manual_seed(0)
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


def test_a_streamer_for_several_sequences_goes_to_hf(model: Any) -> None:
    class Steps(list[torch.Tensor]):
        def put(self, tokens: torch.Tensor) -> None:
            self.append(tokens)

        def end(self) -> None:
            pass

    he.accelerate(model)
    steps = Steps()
    with pytest.warns(RuntimeWarning, match="streamer for several sequences"):
        found = model.generate(IDS, streamer=steps, do_sample=False, **OPTIONS)
    assert torch.equal(torch.stack(steps[1:], 1), found[:, 5:])


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


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_soft_prompts_go_to_hf(model: Any, kind: str) -> None:
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    prompted = peft.get_peft_model(model, config).eval()
    options = {"input_ids": IDS, "do_sample": False, **OPTIONS}
    expected = prompted.generate(**options)
    he.accelerate(prompted)
    with pytest.warns(RuntimeWarning, match="soft prompts"):
        assert torch.equal(prompted.generate(**options), expected)
    assert torch.equal(model.generate(**options), prompted.get_base_model().generate(**options))
    assert served(model) == 2  # without its prompt, the model is the engine's again


def test_an_adapter_for_each_row_goes_to_hf(model: Any) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    options = {"input_ids": IDS, "do_sample": False, "adapter_names": ["__base__", "default"]}
    expected = adapted.generate(**options, **OPTIONS)
    he.accelerate(adapted)
    with pytest.warns(RuntimeWarning, match="adapter_names"):
        assert torch.equal(adapted.generate(**options, **OPTIONS), expected)
    assert served(adapted) == 0


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


@pytest.mark.parametrize(
    ("path", "module", "reason"),
    [
        ("model.layers.1.mlp.act_fn", nn.ReLU(), "self-check failed.*from layer 1 on"),
        ("model.norm", nn.LayerNorm(48), "self-check failed.*after the last layer"),
        ("model.norm", nn.Identity(), "found Identity"),
    ],
    ids=["activation", "norm", "no-norm"],
)
def test_a_part_that_is_not_a_linear_is_checked_again(
    model: Any, path: str, module: nn.Module, reason: str
) -> None:
    he.accelerate(model)
    before = model.get_submodule(path)
    model.set_submodule(path, module)
    for _ in range(2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            found = model.generate(IDS, do_sample=False, **OPTIONS)
        with plain_generation(model):
            assert torch.equal(model.generate(IDS, do_sample=False, **OPTIONS), found)
    assert not caught  # warned once
    assert [re.search(reason, each) is not None for each in fallbacks(model)] == [True]
    model.set_submodule(path, before)
    model.generate(IDS, do_sample=False, **OPTIONS)
    assert served(model) == 1


def fallbacks(model: nn.Module) -> dict[str, int]:
    state = he.acceleration(model)
    assert state is not None
    return state.fallbacks


def test_encoder_decoder_stays_with_hf() -> None:
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config)
    with pytest.warns(RuntimeWarning, match="T5.* is not accelerated.*'t5'"):
        he.accelerate(model)
    assert he.acceleration(model) is None


def test_unknown_family_stays_with_hf() -> None:
    with pytest.warns(RuntimeWarning, match="not accelerated.*does not know"):
        he.accelerate(nn.Linear(2, 2))
