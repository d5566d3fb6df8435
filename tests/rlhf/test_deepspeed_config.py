"""Which engine a model gets, and the DeepSpeed configuration that our options become."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf.config import OptimizerConfig, ShardingConfig, TrainingConfig
from rlhf.engines import Engines, SingleProcessEngine
from rlhf.engines.deepspeed_config import Sharding, deepspeed_config, merged

BF16, FP32 = torch.bfloat16, torch.float32


def config(stage: int = 2, offload: str = "none", dtype=FP32, norm: float | None = 1.0, **training):
    sharding = Sharding(stage, offload, dtype)  # type: ignore[arg-type]
    return deepspeed_config(sharding, TrainingConfig(**training), max_grad_norm=norm)


def user_file(folder: Path, **sections: object) -> str:
    path = folder / "user.json"
    path.write_text(json.dumps(sections))
    return str(path)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_stage_precision_and_clipping_are_written(stage: int) -> None:
    found = config(stage, dtype=BF16, norm=0.5)
    assert found["zero_optimization"]["stage"] == stage
    assert found["gradient_clipping"] == 0.5
    assert found["bf16"]["enabled"]
    assert not found["fp16"]["enabled"]
    plain = config(stage)
    assert not plain["bf16"]["enabled"]
    assert not plain["fp16"]["enabled"]


def test_clipping_is_off_where_nothing_is_trained() -> None:
    """Left out it would be 1."""
    assert config(3, norm=None)["gradient_clipping"] == 0.0


def test_offload() -> None:
    def offloaded(found: dict) -> set[str]:
        return {name for name in found["zero_optimization"] if name.startswith("offload_")}

    assert offloaded(config(2)) == set()
    assert offloaded(config(2, "optimizer")) == {"offload_optimizer"}
    assert offloaded(config(3, "all")) == {"offload_optimizer", "offload_param"}
    assert offloaded(config(3, "all", norm=None)) == {"offload_param"}  # there is no optimizer


@pytest.mark.parametrize(
    ("stage", "offload", "message"),
    [(2, "all", "offload=all .* needs ZeRO stage 3, got stage 2"), (0, "optimizer", "1 to 3")],
)
def test_offload_that_a_stage_cannot(stage: int, offload: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(stage, offload)


def test_the_users_file_goes_over_ours(tmp_path: Path) -> None:
    path = user_file(
        tmp_path,
        zero_optimization={"stage": "auto", "overlap_comm": False, "reduce_bucket_size": 10},
        wall_clock_breakdown=True,
    )
    found = config(3, deepspeed_config=path)
    zero = found["zero_optimization"]
    assert (zero["stage"], zero["overlap_comm"], zero["reduce_bucket_size"]) == (3, False, 10)
    assert found["wall_clock_breakdown"]
    assert found["gradient_clipping"] == 1.0


def test_merging_leaves_both_alone() -> None:
    ours, over = {"a": {"b": 1}, "c": 2}, {"a": {"d": [3]}}
    found = merged(ours, over)
    found["a"]["d"].append(4)
    assert found == {"a": {"b": 1, "d": [3, 4]}, "c": 2}
    assert (ours, over) == ({"a": {"b": 1}, "c": 2}, {"a": {"d": [3]}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"optimizer": {"type": "Adam"}}', "sets optimizer; that is the step's optimizer options"),
        ('{"train_batch_size": 8}', "sets train_batch_size; that is the step's batch_size"),
        ('{"hybrid_engine": {"enabled": true}}', "hybrid_engine is not served"),
        ("{", "Expecting"),
        ("[1]", "expected an object"),
        (None, "No such file"),
    ],
)
def test_a_users_file_that_cannot_be(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "user.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        config(deepspeed_config=str(path))
    assert str(path) in str(error.value)


def test_one_process_gets_plain_torch_and_does_not_import_deepspeed() -> None:
    code = (
        "import sys, torch\n"
        "from rlhf.config import OptimizerConfig\n"
        "from rlhf.engines import Engines\n"
        "import rlhf.pipeline\n"
        "Engines().training(torch.nn.Linear(2, 2), OptimizerConfig(), total_steps=1)\n"
        "print('deepspeed' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


@pytest.mark.parametrize("role", ["actor", "critic", "reference", "reward"])
def test_each_model_can_have_a_stage_of_its_own(role: str) -> None:
    training = TrainingConfig(**{role: ShardingConfig(zero_stage=3)})
    engines = Engines(training)
    others = {"actor", "critic", "reference", "reward"} - {role}
    assert engines._stage(role) == 3  # type: ignore[arg-type]
    assert engines._needs_deepspeed(role)  # type: ignore[arg-type]
    for other in others:
        assert not engines._needs_deepspeed(other)  # type: ignore[arg-type]
    module = torch.nn.Linear(2, 2)
    engine = engines.training(module, OptimizerConfig(), total_steps=1, role=min(others))  # type: ignore[arg-type]
    assert isinstance(engine, SingleProcessEngine)
