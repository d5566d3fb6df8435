"""Constants of the time model from iterations that `rlhf bench step` has measured.

Each phase sets the shares of the peaks that it depends on: scoring that of forwards, the updates
those of training and of the optimizer's step, the rollout those of a decode step, of reading and of
multiplying apart where several batches were measured. The shares are those with the least squares
of the logarithms of planned over measured seconds.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf.plan.devices import DEVICES, TFLOPS, Device
from rlhf.plan.memory import Models, Recipe, Strategy
from rlhf.plan.shapes import find_shape
from rlhf.plan.systems import System
from rlhf.plan.time import Cluster, Estimator

# The search for shares: by powers of 2 and then by steps down to a tenth of a percent.
POWERS = range(-8, 9)
STEPS = [2.0 ** (2.0**-i) for i in range(1, 11)]

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
    system = replace(system, source=source, layer_seconds=0.0)
    reading, multiplying = ("weight_read", "cache_read"), ("decode",)
    several = len({row["batch"] for row in rows}) > 1
    decoding = [reading, multiplying] if several else [(*reading, *multiplying)]
    system = _fit(system, [("forward",)], ("score",), rows, device)
    updates = ("update_actor", "update_critic")
    system = _fit(system, [("update",), ("optimizer",)], updates, rows, device)
    return _fit(system, decoding, ("rollout",), rows, device)  # its prefill is a forward


def _fit(
    system: System, shares: Sequence[tuple[str, ...]], phases: Sequence[str], rows: Sequence[Row],
    device: Device,
) -> System:  # fmt: skip
    """The groups of shares, each by a factor of its own, with which the phases fit best."""

    cluster = Cluster(device, 1)
    runs = [(Estimator(*case(row), cluster, system, row["dtype"]), row["phases"]) for row in rows]

    def error(system: System) -> float:
        total = 0.0
        for estimator, measured in runs:
            planned = replace(estimator, system=system).phases()
            total += sum(math.log(planned[phase] / measured[phase]) ** 2 for phase in phases)
        return total

    def scaled(system: System, factors: Sequence[float]) -> System:
        scales = {name: by for group, by in zip(shares, factors, strict=True) for name in group}
        return replace(system, **{name: getattr(system, name) * by for name, by in scales.items()})

    start, least = system, error(system)
    powers = itertools.product(POWERS, repeat=len(shares))
    for exponents in sorted(powers, key=lambda p: sum(map(abs, p))):  # what is as good stays near
        moved = scaled(start, [2.0**exponent for exponent in exponents])
        if (found := error(moved)) < least * (1 - 1e-6):
            system, least = moved, found
    alone = [[i == j for j in range(len(shares))] for i in range(len(shares))]
    for step in STEPS:
        improved = True
        while improved:
            improved = False
            for which, by in itertools.product(alone, (step, 1 / step)):
                moved = scaled(system, [by if chosen else 1.0 for chosen in which])
                if (found := error(moved)) < least * (1 - 1e-6):
                    system, least, improved = moved, found, True
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
