"""The time model with constants from measured iterations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli.main import main
from rlhf.plan.calibrate import calibrate, from_file, measured_device, our_rows, predict
from rlhf.plan.systems import HYBRID

RECORD = Path(__file__).parents[2] / "benchmarks/records/step_15M_cpu.jsonl"


def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RECORD.read_text())
    return found


def test_a_calibrated_phase_is_as_long_as_measured() -> None:
    device = measured_device(record()["machine"], "float32")
    row = our_rows([record()])[1]
    planned = predict(row, device, calibrate(HYBRID, [row], device, "a record"))
    for phase in ("rollout", "score", "update_actor"):
        assert planned[phase] == pytest.approx(row["phases"][phase], rel=0.01)


def test_two_measured_batches_predict_the_one_between_within_20_percent() -> None:
    device = measured_device(record()["machine"], "float32")
    rows = our_rows([record()])
    assert [row["batch"] for row in rows] == [2, 4, 8]
    system = calibrate(HYBRID, [rows[0], rows[2]], device, "a record")
    planned = sum(predict(rows[1], device, system).values())
    assert planned == pytest.approx(rows[1]["seconds"], rel=0.20)


def test_shares_carry_over_to_a_gpu_of_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    system, device = from_file(RECORD, HYBRID)
    assert device.peak("float32") == record()["machine"]["matmul_TFLOPs"] * 1e12
    assert main(["plan", "--model", "opt-1.3b", "--gpu", "H100", "--records", str(RECORD)]) == 0
    assert system.source in " ".join(capsys.readouterr().out.split())


def test_a_record_of_a_known_gpu_keeps_its_memory_and_measured_peaks() -> None:
    machine = {"gpu": "NVIDIA H100 80GB HBM3", "processor": "", "matmul_TFLOPs": 798.0,
               "read_GBps": 2900.0}  # fmt: skip
    device = measured_device(machine, "bfloat16")
    assert device.memory == 80 * 2**30
    assert (device.bandwidth, device.peak("bfloat16")) == (2.9e12, 798e12)


def test_a_file_without_iterations_says_so(tmp_path: Path) -> None:
    path = tmp_path / "generate.jsonl"
    path.write_text('{"bench": "generate", "rows": []}\n')
    with pytest.raises(ValueError, match="no record of `rlhf bench step`"):
        from_file(path, HYBRID)
