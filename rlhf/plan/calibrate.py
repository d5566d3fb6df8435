"""Constants of the time model from iterations that `rlhf bench step` has measured.

Each phase sets the shares of the peaks that it depends on: scoring the FLOP/s of forwards, the
actor's update those of training, and the rollout, as one factor, all of its decode step. Several
rows give the geometric mean.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf.plan.devices import DEVICES, TFLOPS, Device
from rlhf.plan.memory import Models, Recipe, Strategy
from rlhf.plan.shapes import find_shape
from rlhf.plan.systems import System
from rlhf.plan.time import Cluster, Estimator

ROUNDS = 20  # the rollout's prefill depends on the score's share, so a few rounds are needed

Row = dict[str, Any]


def measured_device(machine: Row, dtype: str) -> Device:
    """The device of a record: of the table if its name is there, else what was measured.

    The peaks are the measured ones in both cases.
    """
    name = str(machine["gpu"] or machine["processor"])
    listed = [d for d in DEVICES.values() if all(part in name for part in d.name.split("-"))]
    peaks = {dtype: machine["matmul_TFLOPs"] * TFLOPS}
    bandwidth = 1e9 * machine["read_GBps"]
    if listed:
        known = listed[-1]
        return replace(known, name=name, bandwidth=bandwidth, flops={**known.flops, **peaks})
    memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return Device(name, memory, bandwidth, peaks, 1, 1e9, 1e9, memory, 1e9, dollars=0.0)


def case(row: Row) -> tuple[Models, Recipe, Strategy]:
    """What a measured row ran."""
    recipe = Recipe(row["prompt"], row["new_tokens"], row["batch"], row["batch"])
    layout = Strategy(
        lora=row["lora"], checkpointing=False, micro_batch=row["micro_batch"],
        rollout_batch=row["batch"],
    )  # fmt: skip
    return Models(find_shape(row["model"]), find_shape(row["critic"])), recipe, layout


def predict(row: Row, device: Device, system: System) -> dict[str, float]:
    """Seconds of each phase of a measured row, planned."""
    return Estimator(*case(row), Cluster(device, 1), system, row["dtype"]).phases()


def our_rows(records: Sequence[Row]) -> list[Row]:
    """Rows of full length on one device, of this trainer."""
    return [
        row
        for record in records
        if record["bench"] == "step"
        for row in record["rows"]
        if row["peer"] == "ours" and row["lengths"] == "fixed"
    ]


def calibrate(system: System, rows: Sequence[Row], device: Device, source: str) -> System:
    """The system with the shares that the rows show. Raises ValueError without rows."""
    if not rows:
        raise ValueError(f"{source}: no row of `rlhf bench step` with peer ours and fixed lengths")
    for _ in range(ROUNDS):
        slower = {"rollout": 1.0, "score": 1.0, "update_actor": 1.0}  # than planned
        planned = [predict(row, device, system) for row in rows]
        for phase in slower:
            slower[phase] = statistics.geometric_mean(
                row["phases"][phase] / plan[phase] for row, plan in zip(rows, planned, strict=True)
            )
        system = replace(
            system,
            source=source,
            layer_seconds=0.0,
            weight_read=system.weight_read / slower["rollout"],
            cache_read=system.cache_read / slower["rollout"],
            decode=system.decode / slower["rollout"],
            forward=system.forward / slower["score"],
            update=system.update / slower["update_actor"],
        )
    return system


def from_file(path: Path, system: System) -> tuple[System, Device]:
    """The calibrated system, and the device, of a file that `rlhf bench step --output` wrote."""
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    records = [record for record in lines if record["bench"] == "step"]
    if not records:
        raise ValueError(f"{path}: no record of `rlhf bench step`")
    machine, rows = records[-1]["machine"], our_rows(records[-1:])
    device = measured_device(machine, rows[0]["dtype"] if rows else "bfloat16")
    source = f"measured on {device.name}, commit {machine['commit']}, {machine['date']}"
    return calibrate(system, rows, device, source), device
