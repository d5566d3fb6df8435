"""ZeRO 0 to 3 on gloo ranks against plain torch on one process: same data, same steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf import distributed
from rlhf.config import LoraConfig
from rlhf.engines import TrainingEngine
from rlhf.models import add_adapters
from tests.distributed import training
from tests.distributed.ranks import run_ranks
from tests.rlhf.test_engines import count_calls

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def train(
    zero_stage: int | None, dtype: torch.dtype, options: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Four steps; and from a checkpoint after two, the last two again on other weights."""
    engine = training.engine_of(training.llama(dtype), zero_stage, **options)
    history = []
    for step in range(training.STEPS):
        if step == 2:
            engine.save(folder)
        history.append(training.train_step(engine, step))
    model = training.llama(dtype)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.5)
    resumed = training.engine_of(model, zero_stage, **options)
    resumed.load(folder)
    again = [training.train_step(resumed, step) for step in range(2, training.STEPS)]
    return {
        "history": history,
        "again": again,
        "weights": engine.weights(),
        "resumed": resumed.weights(),
    }


@pytest.fixture(scope="module")
def persist_nothing(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("deepspeed") / "config.json"
    path.write_text(training.PERSIST_NOTHING)
    return str(path)


@pytest.fixture(scope="module", params=[FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
def alone(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[torch.dtype, dict[str, Any]]:
    return request.param, train(None, request.param, {}, tmp_path_factory.mktemp("alone"))


def test_one_process_resumes_bit_for_bit(alone) -> None:
    _, run = alone
    assert run["again"] == run["history"][2:]
    assert_same(run["resumed"], run["weights"])


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3], ids=lambda s: f"zero{s}")
def test_ranks_train_as_one_process_does(
    alone, persist_nothing: str, tmp_path: Path, zero_stage: int
) -> None:
    """The same up to the order of additions; of 16 bits, whose gradients are rounded before they
    are added up, Adam's first steps may turn a gradient near 0 around, lr = 1e-3 each."""
    dtype, expected = alone
    options = {"deepspeed_config": persist_nothing, "gradient_checkpointing": zero_stage == 2}
    first, second = run_ranks(train, zero_stage, dtype, options, tmp_path)
    assert first["history"] == second["history"]
    assert second["weights"] == {}
    relative, absolute = (1e-5, 1e-6) if dtype == FP32 else (1e-3, 2e-3)
    for found, wanted in zip(first["history"], expected["history"], strict=True):
        assert found == pytest.approx(wanted, rel=relative)
        assert found["lr"] == wanted["lr"]
    assert first["weights"].keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(first["weights"][name], weight, rtol=0.01, atol=absolute)
    assert first["again"] == first["history"][2:]
    assert_same(first["resumed"], first["weights"])


def overflow(zero_stage: int | None, folder: Path) -> Iterator[dict[str, float] | bool]:
    """Steps in fp16: one whose loss is too large on the last rank, one after it; then no others."""
    engine = training.engine_of(training.llama(FP16), zero_stage)
    yield training.train_step(engine, 0)
    before = engine.weights()
    engine.backward(training.negative_logprobs(engine, training.batch(1)) * 1e3 * is_last())
    yield engine.step().metrics()
    yield all(torch.equal(weight, before[n]) for n, weight in engine.weights().items())
    engine.save(folder)
    yield training.train_step(engine, 1)
    again = training.engine_of(training.llama(FP16), zero_stage)
    again.load(folder)
    yield training.train_step(again, 1)
    with pytest.raises(ValueError, match="overflows fp16 at any loss scale"):
        diverge(engine)


def diverge(engine: TrainingEngine) -> None:
    for _ in range(15):  # from a loss scale of 2^15
        engine.backward(training.negative_logprobs(engine, training.batch(1)) * float("inf"))
        engine.step()


def is_last() -> bool:
    return distributed.rank() == distributed.world_size() - 1


def _overflow(zero_stage: int | None, folder: Path) -> list[Any]:
    return list(overflow(zero_stage, folder))


@pytest.mark.parametrize(
    "zero_stage",
    [
        pytest.param(None, id="plain"),
        pytest.param(0, id="zero0", marks=pytest.mark.slow),
        pytest.param(2, id="zero2"),
        pytest.param(3, id="zero3", marks=pytest.mark.slow),
    ],
)
def test_a_gradient_that_overflows_fp16_is_left_out(tmp_path: Path, zero_stage: int | None) -> None:
    run = _overflow(None, tmp_path) if zero_stage is None else None
    for found in [run] if run else run_ranks(_overflow, zero_stage, tmp_path):
        first, skipped, unchanged, after, again = found
        assert (first["loss_scale"], first["skipped_steps"]) == (2.0**16, 0.0)
        assert skipped == {"loss_scale": 2.0**15, "skipped_steps": 1.0}
        assert unchanged
        assert (after["loss_scale"], after["skipped_steps"]) == (2.0**15, 1.0)
        assert after == again


def train_twice(zero_stage: int, lora: bool, deepspeed_config: str) -> dict[bool, Any]:
    """Without recomputing activations and with: norms, weights, and how often layers ran."""
    found = {}
    for recompute in (False, True):
        model = training.llama().eval()  # as PPO trains
        if lora:
            torch.manual_seed(5)
            add_adapters(model, LoraConfig(r=4))
        calls = count_calls(model)
        engine = training.engine_of(
            model, zero_stage, deepspeed_config=deepspeed_config, gradient_checkpointing=recompute
        )
        norms = [training.train_step(engine, step)["grad_norm"] for step in range(2)]
        gathered = [n for n, p in model.named_parameters() if p.numel()]
        found[recompute] = norms, engine.weights(), len(calls), gathered
    return found


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_activations_are_recomputed_at_zero_3(persist_nothing: str, lora: bool) -> None:
    """From weights that are gathered for it and given back; not a bit of an update changes."""
    first, _ = run_ranks(train_twice, 3, lora, persist_nothing)
    (norms, weights, calls, _), (again, same, twice, left) = first[False], first[True]
    assert twice == 2 * calls
    assert left == []
    assert again == pytest.approx(norms, rel=1e-6)  # summed in the order of the backward
    assert_same(same, weights)


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
