"""The optimizer behind the trainers: schedule, clipping, decay, master weights."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from rlhf.config import OptimizerConfig, TrainingConfig
from rlhf.engines import Engines, SingleProcessEngine
from rlhf.engines.schedule import learning_rate_factor

LR = 0.01


class Weights(nn.Module):
    """One matrix, one vector, one frozen matrix."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.ones(2, 2, dtype=dtype))
        self.vector = nn.Parameter(torch.ones(2, dtype=dtype))
        self.frozen = nn.Parameter(torch.ones(2, 2, dtype=dtype), requires_grad=False)

    def pull(self, force: Tensor | float) -> Tensor:
        """A loss whose gradient is `force` everywhere."""
        return (force * self.matrix).sum() + (force * self.vector).sum()

    def pull_in_fp32(self, force: float) -> Tensor:
        """The same; every loss here is fp32, whatever the weights are."""
        return (force * self.matrix.float()).sum() + (force * self.vector.float()).sum()


def engine_for(module: nn.Module, *, steps: int = 10, **options) -> SingleProcessEngine:
    options = {"learning_rate": LR, "schedule": "constant", "warmup_fraction": 0.0, **options}
    return SingleProcessEngine(module, OptimizerConfig(**options), total_steps=steps)


def learning_rates(schedule: str, *, steps: int, warmup: float) -> list[float]:
    engine = engine_for(Weights(), steps=steps, schedule=schedule, warmup_fraction=warmup)
    found = []
    for _ in range(steps):
        engine.backward(engine.module.pull(1.0))
        found.append(engine.step().learning_rate / LR)
    return found


def test_schedules_by_hand() -> None:
    """Two steps of warm-up of ten, then eight that fall toward a tenth."""
    assert learning_rates("constant", steps=10, warmup=0.2) == pytest.approx(
        [1 / 3, 2 / 3, *[1.0] * 8]
    )
    assert learning_rates("linear", steps=10, warmup=0.2) == pytest.approx(
        [1 / 3, 2 / 3, *(1 - 0.9 * i / 8 for i in range(8))]
    )
    assert learning_rates("cosine", steps=10, warmup=0.2) == pytest.approx(
        [1 / 3, 2 / 3, *(0.1 + 0.9 * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(8))]
    )


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedule_ends_at_a_tenth_and_stays_there(schedule: str) -> None:
    config = OptimizerConfig(schedule=schedule)
    for step in (100, 101, 1000):
        assert learning_rate_factor(step, 100, config) == pytest.approx(0.1)


@pytest.mark.parametrize("warmup", [0.0, 0.03, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_few_steps_still_have_learning_rates(steps: int, warmup: float) -> None:
    for factor in learning_rates("cosine", steps=steps, warmup=warmup):
        assert 0 < factor <= 1


def test_gradients_are_clipped_and_adams_eps_is_1e_5() -> None:
    """A first step of Adam is lr * g / (|g| + eps): half the learning rate at |g| = eps."""
    module = Weights()
    engine = engine_for(module, max_grad_norm=1e-5 * 6**0.5)
    engine.backward(module.pull(3.0))
    assert engine.step().grad_norm == pytest.approx(3.0 * 6**0.5)  # before clipping
    torch.testing.assert_close(module.matrix.detach(), torch.full((2, 2), 1 - LR / 2))


def test_gradients_under_the_limit_are_left_alone() -> None:
    module = Weights()
    engine = engine_for(module, max_grad_norm=1.0)
    engine.backward(module.pull(1e-5))
    engine.step()
    torch.testing.assert_close(module.matrix.detach(), torch.full((2, 2), 1 - LR / 2))


def test_weight_decay_is_on_matrices_only() -> None:
    module = Weights()
    engine = engine_for(module, weight_decay=0.5)
    engine.backward(module.pull(0.0))
    engine.step()
    torch.testing.assert_close(module.matrix.detach(), torch.full((2, 2), 1 - LR * 0.5))
    assert torch.equal(module.vector.detach(), torch.ones(2))


def test_frozen_parameters_stay() -> None:
    module = Weights()
    engine = engine_for(module, weight_decay=0.5)
    engine.backward(module.pull(1.0))
    engine.step()
    assert torch.equal(module.frozen, torch.ones(2, 2))


def test_gradients_add_up_until_the_step_and_are_cleared_by_it() -> None:
    twice, once = Weights(), Weights()
    engines = [engine_for(twice), engine_for(once)]
    for _ in range(3):
        engines[0].backward(twice.pull(0.1))
        engines[0].backward(twice.pull(0.2))
        engines[1].backward(once.pull(0.3))
        assert engines[0].step().grad_norm == pytest.approx(engines[1].step().grad_norm)
        assert twice.matrix.grad is None
    torch.testing.assert_close(twice.matrix, once.matrix)


def test_small_steps_add_up_in_bf16() -> None:
    """Each is far below bf16's spacing near 1; the masters keep them, the weights follow."""
    half, full = Weights(torch.bfloat16), Weights()
    engines = [engine_for(m, learning_rate=1e-5, steps=1000) for m in (half, full)]
    for _ in range(1000):
        for engine in engines:
            engine.backward(engine.module.pull(1.0))
            engine.step()
    assert half.matrix.dtype == torch.bfloat16
    assert float(full.matrix[0, 0].detach()) == pytest.approx(0.99, abs=1e-4)
    assert torch.equal(half.matrix, full.matrix.to(torch.bfloat16))
    assert torch.equal(half.vector, full.vector.to(torch.bfloat16))


def test_gradients_too_small_for_fp16_do_not_vanish() -> None:
    """1e-9 rounds to 0 there; the loss scale brings it into range, and is taken off again."""
    module = Weights(torch.float16)
    engine = engine_for(module)
    engine.backward(module.pull_in_fp32(1e-9))
    info = engine.step()
    assert info.grad_norm == pytest.approx(1e-9 * 6**0.5, rel=1e-2)
    assert info.metrics("policy/") == {
        "policy/grad_norm": info.grad_norm, "policy/loss_scale": 2.0**16, "policy/skipped_steps": 0,
    }  # fmt: skip


def test_a_step_that_overflows_fp16_leaves_no_trace_but_its_count() -> None:
    """The next ones are those of an engine that never met it, at half the loss scale."""
    modules = [Weights(torch.float16) for _ in range(2)]
    engines = [engine_for(module) for module in modules]
    for force in (0.5, 10.0, -0.25):  # 10 * 2^16 is beyond fp16
        for engine in engines[: 2 if force < 10 else 1]:
            engine.backward(engine.module.pull_in_fp32(force))
            info = engine.step()
        if force == 10.0:
            assert info.is_skipped
            assert info.metrics() == {"loss_scale": 2.0**15, "skipped_steps": 1.0}
    assert torch.equal(modules[0].matrix, modules[1].matrix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("force", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_before_the_weights(
    force: float, dtype: torch.dtype
) -> None:
    module = Weights(dtype)
    before = copy.deepcopy(module.state_dict())
    engine = engine_for(module)
    engine.backward(module.pull(force))
    with pytest.raises(ValueError, match=r"diverged.*lower the learning rate"):
        engine.step()
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("family", ["llama", "opt"])
def test_recomputed_activations_change_nothing_but_memory(causal_lm, family: str, train) -> None:
    """The gradients are the same bits, each layer runs twice, and once without gradients."""
    ids = torch.tensor([[1, 50, 60, 70, 80]])
    found = {}
    for recompute in (False, True):
        model = causal_lm(family).train(train)
        calls = count_calls(model)
        engines = Engines(TrainingConfig(gradient_checkpointing=recompute))
        engine = engines.training(model, OptimizerConfig(), total_steps=1)
        torch.manual_seed(3)  # dropout is drawn once
        engine.backward(engine(lambda model: model(input_ids=ids).logits.square().sum()))
        gradients = [p.grad for p in model.parameters()]
        with_gradients = len(calls)
        with torch.no_grad():
            model(input_ids=ids)
        found[recompute] = gradients
        assert with_gradients == 2 * (1 + recompute)
        assert len(calls) == with_gradients + 2
    assert all(torch.equal(a, b) for a, b in zip(*found.values(), strict=True))


def count_calls(model: nn.Module) -> list[str]:
    """A list that grows with each call of a layer's first norm."""
    calls: list[str] = []
    for name, module in model.named_modules():
        if name.endswith(("input_layernorm", "self_attn_layer_norm")):
            module.register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


def test_a_model_without_layers_to_recompute() -> None:
    with pytest.raises(ValueError, match="Weights has no layers to recompute"):
        Engines(TrainingConfig(gradient_checkpointing=True)).training(
            Weights(), OptimizerConfig(), total_steps=1
        )
