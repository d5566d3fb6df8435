"""The parameters of a layer from what ZeRO-3's ranks hold of them."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.cases.case import Case, Sweeps, randn, size
from hybrid_engine import ops
from hybrid_engine.ops import UnpackEntry, unpack_plan


def gather_unpack(batch: int, hidden: int, dtype: torch.dtype) -> Case:
    """One Llama layer, gathered from `batch` ranks, to fused QKV and gate-up in bf16."""
    kv, inner = hidden // 4, hidden * 8 // 3
    shapes = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    places = [(0, 0), (0, hidden), (0, hidden + kv), (1, 0), (2, 0), (2, inner), (3, 0)]
    outs = [
        torch.zeros(rows, columns, dtype=torch.bfloat16)
        for rows, columns in ((hidden + 2 * kv, hidden), shapes[3], (2 * inner, hidden), shapes[6])
    ]
    entries, source = [], 0
    for (rows, columns), (destination, row) in zip(shapes, places, strict=True):
        partition = -(-rows * columns // batch)
        entries.append(
            UnpackEntry(source, partition, rows, columns, destination, row, 0, rows, 0, columns)
        )
        source += partition
    bucket, plan = randn(batch, source, dtype=dtype), unpack_plan(entries)

    def ours(bucket: Tensor, *outs: Tensor) -> None:
        ops.gather_unpack(bucket, plan, list(outs), [], [], [])

    def plain(bucket: Tensor, *outs: Tensor) -> None:
        full = []
        for e in entries:
            flat = bucket[:, e.source : e.source + e.partition].reshape(-1)
            full.append(flat[: e.rows * e.columns].view(e.rows, e.columns))
        outs[0].copy_(torch.cat(full[:3]))
        outs[1].copy_(full[3])
        outs[2].copy_(torch.cat(full[4:6]))
        outs[3].copy_(full[6])

    return Case(
        "gather_unpack", ours, plain, [(bucket, *outs)], size(bucket, *outs),
        lambda out, args: torch.cat([x.flatten() for x in args[1:]]),
    )  # fmt: skip


SWEEPS: Sweeps = {gather_unpack: ((8,), (288, 1024))}
