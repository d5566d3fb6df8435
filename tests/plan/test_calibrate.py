"""The time model with constants from measured iterations."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli.main import main
from rlhf.plan.calibrate import calibrate, from_file, measured_device, our_rows, predict
from rlhf.plan.systems import HYBRID

RECORD = Path(__file__).parents[2] / "benchmarks/records/step_15M_cpu.jsonl"
OTHER = RECORD.with_name("step_tiny_cpu.jsonl")


def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RECORD.read_text())
    return found


def test_a_calibrated_phase_is_as_long_as_measured() -> None:
    device = measured_device(record()["machine"], "float32")
    row = our_rows([record()])[1]
    planned = predict(row, device, calibrate(HYBRID, [row], device, "a record"))
    for phase in ("rollout", "score", "update_actor"):
        assert planned[phase] == pytest.approx(row["phases"][phase], rel=0.01)


@pytest.mark.parametrize("left_out", [0, 1, 2], ids=["B2", "B4", "B8"])
def test_each_measured_batch_is_predicted_from_the_others(left_out: int) -> None:
    """Between two measured ones, under both and over both: within 20 %."""
    device = measured_device(record()["machine"], "float32")
    rows = our_rows([record()])
    assert [row["batch"] for row in rows] == [2, 4, 8]
    row = rows.pop(left_out)
    planned = predict(row, device, calibrate(HYBRID, rows, device, "a record"))
    assert sum(planned.values()) == pytest.approx(row["seconds"], rel=0.20)


def test_another_model_in_another_run_is_predicted() -> None:
    """`tiny` from the shares of 15M, on the same kind of machine: within 20 %."""
    system, _ = from_file(RECORD, HYBRID)
    other = [json.loads(line) for line in OTHER.read_text().splitlines()]
    (row,) = our_rows(other)
    assert (row["model"], row["batch"]) == ("tiny", 8)
    device = measured_device(other[0]["machine"], "float32")
    assert sum(predict(row, device, system).values()) == pytest.approx(row["seconds"], rel=0.20)


def test_known_shares_are_found_again() -> None:
    """Iterations planned with some shares and taken for measured give these shares."""
    device = measured_device(record()["machine"], "float32")
    known = replace(
        HYBRID, layer_seconds=0.0, forward=0.3, update=0.2, optimizer=0.1, weight_read=0.5,
        cache_read=0.4, decode=0.15,
    )  # fmt: skip
    rows = [{**row, "phases": predict(row, device, known)} for row in our_rows([record()])]
    found = calibrate(HYBRID, rows, device, "a plan")
    for name in ("forward", "update", "optimizer", "weight_read", "cache_read", "decode"):
        assert getattr(found, name) == pytest.approx(getattr(known, name), rel=0.01), name


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
