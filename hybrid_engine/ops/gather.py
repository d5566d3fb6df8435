"""From one all-gathered bucket of partitioned parameters to the layouts of the decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from hybrid_engine.ops import check
from hybrid_engine.ops.registry import define_op


@dataclass(frozen=True)
class UnpackEntry:
    """One slice of one parameter on its way from the bucket to a destination.

    ZeRO-3 cuts a parameter of n elements into `world` row-major runs of `partition` elements, the
    last ones padded. A parameter that several destinations need has several entries.
    """

    source: int  # where the parameter starts in each rank's part of the bucket
    partition: int  # elements of it that each rank holds
    rows: int  # of the whole parameter; a vector has rows = its length
    columns: int  # 1 for a vector
    destination: int  # index into the destinations
    destination_row: int  # the row of the destination at which the slice starts
    row_begin: int  # the slice: rows [row_begin, row_end) ...
    row_end: int
    column_begin: int  # ... and columns [column_begin, column_end), all that the destination has
    column_end: int
    lora: int = -1  # index into the low-rank factors that are added, -1: none


PLAN_WIDTH = len(UnpackEntry.__dataclass_fields__)


def unpack_plan(entries: Sequence[UnpackEntry]) -> Tensor:
    """The entries as the (P, 11) int64 tensor that `gather_unpack` takes; make it once."""
    rows = [astuple(entry) for entry in entries]
    return torch.tensor(rows, dtype=torch.int64).view(len(rows), PLAN_WIDTH)


def _fake(*args: object) -> None:
    return None


@define_op(
    "gather_unpack(Tensor bucket, Tensor plan, Tensor(a!)[] destinations, Tensor[] lora_a, "
    "Tensor[] lora_b, float[] lora_scales) -> ()",
    fake=_fake,
)
def gather_unpack(
    bucket: Tensor,
    plan: Tensor,
    destinations: list[Tensor],
    lora_a: list[Tensor],
    lora_b: list[Tensor],
    lora_scales: list[float],
) -> None:
    """Write every destination of a bucket in one call: cast, fuse by rows, slice, merge LoRA.

    Args:
        bucket: (world, L), fp32, bf16 or fp16: each rank's part, one all-gather's output.
        plan: (P, 11) int64 on the CPU, from `unpack_plan`.
        destinations: matrices or vectors of any of the three dtypes, written in place. A fused QKV
            or gate-up weight is one destination with several entries.
        lora_a, lora_b, lora_scales: factors (rank, columns), (rows, rank) of whole parameters, one
            dtype a pair; an entry that names a pair i gets lora_scales[i] * B A added in fp32,
            before the one rounding. Factors that are in a bucket themselves come from an earlier
            call.

    Element i of a parameter is at bucket[i // partition, source + i % partition].
    """
    check.first_operand("bucket", bucket)
    check.shape("bucket", bucket, (-1, -1))
    check.shape("plan", plan, (-1, PLAN_WIDTH))
    check.dtype("plan", plan, torch.int64)
    if not len(lora_a) == len(lora_b) == len(lora_scales):
        raise ValueError(
            f"lora_b, lora_scales: expected {len(lora_a)} of each, as in lora_a, got "
            f"{len(lora_b)} and {len(lora_scales)}"
        )
    for index, row in enumerate(plan.tolist()):
        entry = UnpackEntry(*row)
        _check_entry(index, entry, bucket, destinations, len(lora_a))
        part = bucket[:, entry.source : entry.source + entry.partition]
        full = part.reshape(-1)[: entry.rows * entry.columns].view(entry.rows, entry.columns)
        if entry.lora >= 0:
            a, b = lora_a[entry.lora], lora_b[entry.lora]
            check.operand("lora_a", a, (-1, entry.columns), a.dtype, bucket)
            check.operand("lora_b", b, (entry.rows, a.shape[0]), a.dtype, bucket)
            full = full.float() + lora_scales[entry.lora] * (b.float() @ a.float())
        to, width = destinations[entry.destination], entry.column_end - entry.column_begin
        rows = to.view(to.shape[0], width)[entry.destination_row :][
            : entry.row_end - entry.row_begin
        ]
        rows.copy_(full[entry.row_begin : entry.row_end, entry.column_begin : entry.column_end])


def _check_entry(
    index: int, entry: UnpackEntry, bucket: Tensor, destinations: list[Tensor], loras: int
) -> None:
    world, length = bucket.shape
    _check_range(index, "partition", entry.partition, 1, length)
    _check_range(index, "source", entry.source, 0, length - entry.partition)
    if entry.rows * entry.columns > world * entry.partition:
        raise ValueError(
            f"plan: entry {index}: {entry.rows * entry.columns} elements do not fit in {world} "
            f"partitions of {entry.partition}"
        )
    _check_range(index, "row_end", entry.row_end, 0, entry.rows)
    _check_range(index, "row_begin", entry.row_begin, 0, entry.row_end)
    _check_range(index, "column_end", entry.column_end, 0, entry.columns)
    _check_range(index, "column_begin", entry.column_begin, 0, entry.column_end)
    _check_range(index, "destination", entry.destination, 0, len(destinations) - 1)
    to = destinations[entry.destination]
    check.first_operand("destinations", to)
    if to.dim() not in (1, 2):
        raise ValueError(f"destinations: expected vectors and matrices, got {list(to.shape)}")
    width, wanted = (to.shape[1] if to.dim() == 2 else 1), entry.column_end - entry.column_begin
    if width != wanted:
        raise ValueError(f"destinations: entry {index}: expected {wanted} columns, got {width}")
    rows = entry.row_end - entry.row_begin
    _check_range(index, "destination_row", entry.destination_row, 0, to.shape[0] - rows)
    _check_range(index, "lora", entry.lora, -1, loras - 1)


def _check_range(index: int, name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(
            f"plan: entry {index}: {name}: expected a value in [{low}, {high}], got {value}"
        )
