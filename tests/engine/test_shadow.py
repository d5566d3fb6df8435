"""Weights stored in fp32, rollouts in bf16 from a copy that the flip refreshes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hybrid_engine import EngineConfig, HybridEngine, SamplingParams, models

BF16 = EngineConfig(dtype="bfloat16")
PARAMS = SamplingParams(max_new_tokens=12, seed=3)
IDS = torch.tensor([[1, 5, 9, 33, 70, 2, 8], [1, 90, 4, 4, 17, 23, 61]])
FAMILIES = pytest.mark.parametrize("family", models.FAMILIES)


def training_step(model: Any) -> list[Tensor]:
    model.zero_grad()
    output = model(input_ids=IDS, labels=IDS)
    output.loss.backward()
    return [output.logits.detach(), *(p.grad.clone() for p in model.parameters())]


def rounded(model: Any) -> Any:
    """A copy with parameters in bf16; `to` would round the rotary frequencies too."""
    duplicate = copy.deepcopy(model)
    for parameter in duplicate.parameters():
        parameter.data = parameter.data.bfloat16()
    return duplicate


@torch.no_grad()
def hf_logits(model: Any, prompt: list[int]) -> Tensor:
    return model(torch.tensor([prompt])).logits[0].float()


@FAMILIES
def test_logits_are_within_twice_hf_error(build, prompts, family: str) -> None:
    """Hugging Face's own error is that of the same model cast to bf16."""
    model = build(family)
    truth = hf_logits(model, prompts[4])
    hf_error = (hf_logits(copy.deepcopy(model).to(torch.bfloat16), prompts[4]) - truth).norm()
    engine = HybridEngine(model, BF16)
    found, _ = engine.forward(prompts[4])
    assert engine.dtype == found.dtype == torch.bfloat16
    error = (found.float() - truth).norm()
    assert 0 < error <= 2 * hf_error


@FAMILIES
def test_training_never_notices(build, prompts, family: str) -> None:
    """State, storages, forward and gradients, while the engine is there and after release."""
    untouched, model = build(family), build(family)
    state, step = untouched.state_dict(), training_step(untouched)
    storages = [p.untyped_storage().data_ptr() for p in model.parameters()]
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    engine = HybridEngine(model, BF16)
    engine.generate(prompts, PARAMS)
    for _ in range(2):
        assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)
        assert all(map(torch.equal, training_step(model), step))
        assert [p.untyped_storage().data_ptr() for p in model.parameters()] == storages
        engine.release()
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_neox"])
def test_optimizer_step_is_seen_by_the_next_rollout(build, prompts, family: str) -> None:
    model = build(family)
    engine = HybridEngine(model, BF16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    seen = []
    for _ in range(3):
        found = engine.generate(prompts, PARAMS)
        expected = HybridEngine(rounded(model)).generate(prompts, PARAMS)
        assert torch.equal(found.tokens, expected.tokens)
        seen.append(found.tokens)
        training_step(model)
        optimizer.step()
    assert not torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])


def assign(model: Any, state: dict[str, Tensor]) -> None:
    model.load_state_dict(state, assign=True)


def resize(model: Any, state: dict[str, Tensor]) -> None:
    model.load_state_dict(state)
    model.resize_token_embeddings(96)


def replace_data(model: Any, state: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.data = state[name]


@pytest.mark.parametrize("change", [assign, resize, replace_data], ids=lambda f: f.__name__)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_replaced_weights_are_seen(build, prompts, change: Any, tied: bool) -> None:
    model = build("llama", tie_word_embeddings=tied)
    engine = HybridEngine(model, BF16)
    old = engine.generate(prompts, PARAMS)
    other = {name: tensor * -0.7 for name, tensor in model.state_dict().items()}
    change(model, other)
    found = engine.generate(prompts, PARAMS)
    expected = HybridEngine(rounded(model)).generate(prompts, PARAMS)
    assert torch.equal(found.tokens, expected.tokens)
    assert not torch.equal(found.tokens[:, :1], old.tokens[:, :1])


def test_release_frees_the_copy_and_the_engine_works_again(build, prompts) -> None:
    engine = HybridEngine(build("llama"), BF16)
    first = engine.generate(prompts, PARAMS)
    shadow: nn.Module = engine._shadow.model  # type: ignore[union-attr]
    assert all(p.dtype == torch.bfloat16 and p.numel() for p in shadow.parameters())
    engine.release()
    assert sum(p.untyped_storage().nbytes() for p in shadow.parameters()) == 0
    assert torch.equal(engine.generate(prompts, PARAMS).tokens, first.tokens)


def test_adapters_switch_in_the_shadow_too(build, prompts) -> None:
    peft = pytest.importorskip("peft")
    base = build("llama")
    plain = HybridEngine(base, BF16).generate(prompts, PARAMS)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = peft.get_peft_model(base, config).eval()
    engine = HybridEngine(model.get_base_model(), BF16)
    adapted = engine.generate(prompts, PARAMS)
    assert not torch.equal(adapted.tokens, plain.tokens)
    with model.disable_adapter():
        assert torch.equal(engine.generate(prompts, PARAMS).tokens, plain.tokens)
    assert torch.equal(engine.generate(prompts, PARAMS).tokens, adapted.tokens)


def test_weights_of_that_type_are_not_copied(build, prompts) -> None:
    model = build("llama").to(torch.bfloat16)
    engine = HybridEngine(model, BF16)
    expected = HybridEngine(copy.deepcopy(model)).generate(prompts, PARAMS)
    assert torch.equal(engine.generate(prompts, PARAMS).tokens, expected.tokens)
    own = {id(p) for p in model.parameters()}
    assert {id(p) for p in engine._shadow.model.parameters()} == own  # type: ignore[union-attr]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=lambda m: m.__name__)
def test_rollouts_in_and_out_of_inference_mode(build, prompts, mode: Any) -> None:
    engine = HybridEngine(build("llama"), BF16)
    with mode():
        inside = engine.generate(prompts, PARAMS)
    assert torch.equal(engine.generate(prompts, PARAMS).tokens, inside.tokens)
    training_step(engine._model)


def test_dtype_must_be_one_of_two() -> None:
    with pytest.raises(ValueError, match="dtype must be bfloat16, float16 or None, got 'int8'"):
        EngineConfig(dtype="int8")  # type: ignore[arg-type]
