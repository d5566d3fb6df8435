"""ZeRO 0 to 3 on gloo ranks against plain torch on one process: same data, same steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed import training
from tests.distributed.ranks import run_ranks

BF16, FP32 = torch.bfloat16, torch.float32


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


@pytest.fixture(scope="module", params=[FP32, BF16], ids=["fp32", "bf16"])
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
    """The same up to the order of additions; of bf16, whose gradients are rounded before they are
    added up, Adam's first steps may turn a gradient near 0 around, lr = 1e-3 each."""
    dtype, expected = alone
    # Recomputed activations change no bit of a gradient, at one stage for all.
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


def assert_same(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
