"""The engine reads the weights that train: nothing is patched, nothing goes stale."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from hybrid_engine import HybridEngine, SamplingParams

GREEDY = SamplingParams(max_new_tokens=12, temperature=0.0)
FAMILIES = pytest.mark.parametrize("family", ["llama", "opt"])
IDS = torch.tensor([[1, 5, 9, 33, 70, 2, 8], [1, 90, 4, 4, 17, 23, 61]])


def training_step(model: nn.Module) -> tuple[Tensor, list[Tensor]]:
    """Logits and every gradient of a language-model loss."""
    model.zero_grad()
    output = model(input_ids=IDS, labels=IDS)
    output.loss.backward()
    return output.logits.detach(), [p.grad.clone() for p in model.parameters()]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_state(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def assert_same_step(
    found: tuple[Tensor, list[Tensor]], expected: tuple[Tensor, list[Tensor]]
) -> None:
    assert torch.equal(found[0], expected[0])
    for gradient, wanted in zip(found[1], expected[1], strict=True):
        assert torch.equal(gradient, wanted)


def replace_weights(model: nn.Module, factor: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)


@FAMILIES
def test_engine_changes_nothing_in_training(build, prompts, family: str) -> None:
    """State, forward and gradients are bitwise those of a model that never met the engine."""
    untouched, model = build(family), build(family)
    state, step = snapshot(untouched), training_step(untouched)
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    storages = [p.untyped_storage().nbytes() for p in model.parameters()]

    engine = HybridEngine(model)
    engine.generate(prompts, GREEDY)
    assert_same_state(model.state_dict(), state)
    assert_same_step(training_step(model), step)
    for name, module in model.named_modules():
        assert set(vars(module)) == attributes[name], name
        assert type(module) is type(untouched.get_submodule(name))

    engine.release()
    assert_same_state(model.state_dict(), state)
    assert_same_step(training_step(model), step)
    assert [p.untyped_storage().nbytes() for p in model.parameters()] == storages


@FAMILIES
def test_parameters_stay_the_objects_that_the_optimizer_holds(build, prompts, family: str) -> None:
    model = build(family)
    before = list(model.parameters())
    engine = HybridEngine(model)
    engine.generate(prompts, GREEDY)
    engine.release()
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))


@FAMILIES
def test_engine_works_again_after_release(build, prompts, family: str) -> None:
    engine = HybridEngine(build(family))
    first = engine.generate(prompts, GREEDY)
    engine.release()
    assert torch.equal(engine.generate(prompts, GREEDY).tokens, first.tokens)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_save_pretrained_while_the_engine_holds_views(
    build, hf_greedy, prompts, tmp_path: Path, tied: bool
) -> None:
    model = build("llama", tie_word_embeddings=tied)
    engine = HybridEngine(model)
    responses = engine.generate(prompts, GREEDY)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_state(loaded.state_dict(), snapshot(model))
    assert responses.response(0) == hf_greedy(loaded, prompts[0], GREEDY.max_new_tokens)


def test_torch_save_while_the_engine_holds_views(build, prompts, tmp_path: Path) -> None:
    model = build("llama")
    HybridEngine(model).generate(prompts, GREEDY)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    assert_same_state(torch.load(tmp_path / "state.pt"), snapshot(model))


def test_deepcopy_owns_its_weights(build, hf_greedy, prompts) -> None:
    model = build("llama")
    engine = HybridEngine(model)
    engine.generate(prompts, GREEDY)
    copied, state = copy.deepcopy(model), snapshot(model)
    replace_weights(model, 0.5)
    assert_same_state(copied.state_dict(), state)
    response = HybridEngine(copied).generate(prompts, GREEDY).response(0)
    assert response == hf_greedy(copied, prompts[0], GREEDY.max_new_tokens)


def in_place(model: nn.Module, state: dict[str, Tensor]) -> None:
    model.load_state_dict(state)


def assigned(model: nn.Module, state: dict[str, Tensor]) -> None:
    model.load_state_dict(state, assign=True)


def data_replaced(model: nn.Module, state: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.data = state[name]


def half_replaced(model: nn.Module, state: dict[str, Tensor]) -> None:
    """As a checkpoint that holds only some of the fused parameters."""
    for name, parameter in model.named_parameters():
        if "k_proj" in name:
            parameter.data = state[name]
        else:
            parameter.data.copy_(state[name])


@FAMILIES
@pytest.mark.parametrize(
    "replace", [in_place, assigned, data_replaced, half_replaced], ids=lambda f: f.__name__
)
def test_new_weights_are_seen_by_the_next_rollout(
    build, hf_greedy, prompts, family: str, replace: Callable[..., None]
) -> None:
    model, other = build(family), build(family)
    replace_weights(other, 0.7)
    engine = HybridEngine(model)
    old = engine.generate(prompts, GREEDY).response(4)
    replace(model, snapshot(other))
    new = engine.generate(prompts, GREEDY).response(4)
    assert new == hf_greedy(other, prompts[4], GREEDY.max_new_tokens) != old


@pytest.mark.parametrize(
    "replace", [in_place, assigned, data_replaced, half_replaced], ids=lambda f: f.__name__
)
def test_release_after_new_weights_unshares_all(
    build, prompts, replace: Callable[..., None]
) -> None:
    model, other = build("llama"), build("llama")
    replace_weights(other, 0.7)
    engine = HybridEngine(model)
    engine.generate(prompts, GREEDY)
    replace(model, snapshot(other))
    engine.release()
    assert_same_state(model.state_dict(), other.state_dict())
    shared = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert len(shared) == len(list(model.parameters()))


@FAMILIES
def test_optimizer_step_is_seen_by_the_next_rollout(build, hf_greedy, prompts, family) -> None:
    model = build(family)
    engine = HybridEngine(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    responses = []
    for _ in range(3):
        responses.append(engine.generate(prompts, GREEDY).response(4))
        assert responses[-1] == hf_greedy(model, prompts[4], GREEDY.max_new_tokens)
        training_step(model)
        optimizer.step()
    assert len({tuple(response) for response in responses}) == 3


def test_cast_between_rollouts(build, hf_greedy, prompts) -> None:
    model = build("llama")
    engine = HybridEngine(model)
    expected = engine.generate(prompts, GREEDY)
    model.to(torch.bfloat16)
    rounded = engine.generate(prompts, GREEDY)
    fresh = HybridEngine(build("llama").to(torch.bfloat16)).generate(prompts, GREEDY)
    assert torch.equal(rounded.tokens, fresh.tokens)
    assert torch.equal(rounded.logprobs, fresh.logprobs)
    assert not torch.equal(rounded.logprobs, expected.logprobs)
    model.float()  # rounded weights, full arithmetic
    response = engine.generate(prompts, GREEDY).response(4)
    assert response == hf_greedy(model, prompts[4], GREEDY.max_new_tokens)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad], ids=lambda m: m.__name__)
def test_training_goes_on_after_a_rollout_without_gradients(build, prompts, mode) -> None:
    untouched, model = build("llama"), build("llama")
    with mode():
        HybridEngine(model).generate(prompts, GREEDY)
    assert_same_step(training_step(model), training_step(untouched))


def test_two_engines_on_one_model_take_turns(build, prompts) -> None:
    model = build("llama")
    first, second = HybridEngine(model), HybridEngine(model)
    expected = first.generate(prompts, GREEDY)
    for engine in (second, first, second):
        assert torch.equal(engine.generate(prompts, GREEDY).tokens, expected.tokens)
    first.release()
    assert torch.equal(second.generate(prompts, GREEDY).tokens, expected.tokens)


class LowRankLinear(nn.Module):
    """As an adapter library wraps a layer: it still has the `weight` of what it wraps."""

    def __init__(self, wrapped: nn.Linear) -> None:
        super().__init__()
        self.wrapped = wrapped
        self.low_rank = nn.Parameter(torch.full((wrapped.in_features,), 0.5))

    @property
    def weight(self) -> Tensor:
        return self.wrapped.weight

    @property
    def bias(self) -> Tensor | None:
        return self.wrapped.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.wrapped(x) + F.linear(x, self.low_rank[None])


LINEARS = ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]


@pytest.mark.parametrize("path", LINEARS)
def test_an_adapter_is_never_ignored(build, path: str) -> None:
    model = build("llama")
    wrap(model, f"model.layers.1.{path}")
    with pytest.raises(ValueError, match="LowRankLinear"):
        HybridEngine(model)


@pytest.mark.parametrize("path", LINEARS)
def test_an_adapter_put_in_later_is_never_ignored(build, prompts, path: str) -> None:
    model = build("llama")
    engine = HybridEngine(model)
    engine.generate(prompts, GREEDY)
    wrap(model, f"model.layers.1.{path}")
    with pytest.raises(ValueError, match="LowRankLinear"):
        engine.generate(prompts, GREEDY)


def test_a_resized_embedding_is_seen(build, hf_greedy, prompts) -> None:
    model = build("llama")
    engine = HybridEngine(model)
    engine.generate(prompts, GREEDY)
    model.resize_token_embeddings(100)
    replace_weights(model, 0.7)
    response = engine.generate([[1, 99, 98]], GREEDY).response(0)
    assert response == hf_greedy(model, [1, 99, 98], GREEDY.max_new_tokens)


@pytest.mark.parametrize("added", [True, False], ids=["added", "taken_out"])
def test_a_bias_that_comes_or_goes_is_seen(build, hf_greedy, prompts, added: bool) -> None:
    model = build("llama", attention_bias=not added)
    engine = HybridEngine(model)
    old = engine.generate(prompts, GREEDY).response(4)
    for layer in model.model.layers:
        for name, width in (("q_proj", 96), ("k_proj", 32), ("v_proj", 32)):
            bias = nn.Parameter(torch.ones(width)) if added else None
            layer.self_attn.get_submodule(name).bias = bias
    new = engine.generate(prompts, GREEDY).response(4)
    assert new == hf_greedy(model, prompts[4], GREEDY.max_new_tokens) != old
    model.model.layers[0].self_attn.k_proj.bias = None if added else nn.Parameter(torch.ones(32))
    with pytest.raises(ValueError, match="a bias each, or none at all"):
        engine.generate(prompts, GREEDY)


def test_release_after_new_modules_unshares_all(build, prompts) -> None:
    model = build("llama")
    engine = HybridEngine(model)
    engine.generate(prompts, GREEDY)
    model.resize_token_embeddings(100)
    engine.generate(prompts, GREEDY)
    engine.release()
    shared = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert len(shared) == len(list(model.parameters()))


def wrap(model: nn.Module, path: str) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, LowRankLinear(model.get_submodule(path)))
