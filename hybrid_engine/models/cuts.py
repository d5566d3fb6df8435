"""Tensor parallelism: which outputs and inputs of each linear layer a rank holds.

Attention heads and MLP columns are divided; the layer that ends a block takes the matching inputs,
and its outputs are summed over the ranks (Megatron-LM, arXiv 1909.08053, section 3). Where there
are fewer kv heads than ranks, several ranks hold the same one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from hybrid_engine.models.family import Family
from hybrid_engine.models.lora import base_of
from hybrid_engine.parallel import TensorParallel
from hybrid_engine.weights import Piece, Range


@dataclass(frozen=True)
class Heads:
    """A rank's heads."""

    query: Range
    kv: Range
    head_dim: int


@dataclass(frozen=True)
class Cut:
    """A rank's part of a linear layer: runs of its outputs, one run of its inputs; None: all."""

    outputs: tuple[Range, ...] | None = None
    inputs: Range | None = None

    def weight(self, module: Any) -> list[Piece]:
        """Of the weight (outputs, inputs), which Conv1D stores as (inputs, outputs)."""
        outputs, inputs = self.sizes(module)
        columns, runs = self.inputs or (0, inputs), self.outputs or ((0, outputs),)
        if type(module) is not Conv1D:
            return _stacked(runs, columns)
        if len(runs) == 1:
            return [Piece(columns, runs[0], 0)]
        rows = range(*columns)  # several runs of one row lie side by side
        return [
            Piece((row, row + 1), run, (row - rows[0]) * len(runs) + i)
            for row in rows
            for i, run in enumerate(runs)
        ]

    def shape(self, module: Any) -> tuple[int, int]:
        """Of the rank's weight, as it is stored."""
        outputs, inputs = self.sizes(module)
        columns = self.inputs or (0, inputs)
        mine = sum(end - begin for begin, end in self.outputs or ((0, outputs),))
        width = columns[1] - columns[0]
        return (width, mine) if type(module) is Conv1D else (mine, width)

    def bias(self, module: Any) -> list[Piece]:
        return _stacked(self.outputs or ((0, self.sizes(module)[0]),), (0, 1))

    @staticmethod
    def sizes(module: Any) -> tuple[int, int]:
        """Outputs and inputs of the whole layer."""
        if type(module) is Conv1D:
            return module.nf, module.nx
        return module.out_features, module.in_features


def heads_of(config: Any, parallel: TensorParallel | None) -> Heads:
    """Raises ValueError when the heads cannot be divided."""
    query: int = config.num_attention_heads
    kv: int = getattr(config, "num_key_value_heads", None) or query
    head_dim: int = getattr(config, "head_dim", None) or config.hidden_size // query
    if parallel is None:
        return Heads((0, query), (0, kv), head_dim)
    size = parallel.size
    if query % size or (kv % size and size % kv):
        raise ValueError(
            f"inference_tp_size={size} does not divide the model's {query} attention heads and "
            f"{kv} key-value heads"
        )
    queries = parallel.share(query)
    first = queries[0] * kv // query
    return Heads(queries, (first, first + max(1, kv // size)), head_dim)


def layer_cuts(
    layer: nn.Module, family: Family, heads: Heads, config: Any, parallel: TensorParallel | None
) -> dict[nn.Module, Cut]:
    """The linear layers of one decoder layer that are cut, or reordered."""
    find = layer.get_submodule
    cuts = _qkv_cuts([find(path) for path in family.qkv], family, heads, config, parallel)
    if parallel is None:
        return cuts
    attended = _run(heads.query, heads.head_dim)
    cuts[find(family.attention_output)] = Cut(inputs=attended)
    for path in family.mlp_up:
        width = Cut.sizes(base_of(find(path)))[0]
        if width % parallel.size:
            raise ValueError(
                f"inference_tp_size={parallel.size} does not divide the MLP's width {width}"
            )
        cuts[find(path)] = Cut(outputs=(parallel.share(width),))
        cuts[find(family.mlp_down)] = Cut(inputs=parallel.share(width))
    return cuts


def _qkv_cuts(
    modules: list[nn.Module],
    family: Family,
    heads: Heads,
    config: Any,
    parallel: TensorParallel | None,
) -> dict[nn.Module, Cut]:
    dim, total = heads.head_dim, config.num_attention_heads
    if family.qkv_rows_by_head:  # [head, (q, k, v), dim] becomes [(q, k, v), head, dim]
        starts = [(head * 3 + part) * dim for part in range(3) for head in range(*heads.query)]
        return {modules[0]: Cut(outputs=tuple((start, start + dim) for start in starts))}
    if parallel is None:
        return {}
    runs = [_run(heads.query, dim), _run(heads.kv, dim), _run(heads.kv, dim)]
    if len(modules) == 3:
        return {module: Cut(outputs=(run,)) for module, run in zip(modules, runs, strict=True)}
    starts = [part * total * dim for part in range(3)]
    outputs = tuple(
        (start + run[0], start + run[1]) for start, run in zip(starts, runs, strict=True)
    )
    return {modules[0]: Cut(outputs=outputs)}


def _run(heads: Range, dim: int) -> Range:
    return heads[0] * dim, heads[1] * dim


def _stacked(runs: tuple[Range, ...], columns: Range) -> list[Piece]:
    """Runs of rows, one below the other."""
    pieces, to_row = [], 0
    for begin, end in runs:
        pieces.append(Piece((begin, end), columns, to_row))
        to_row += end - begin
    return pieces
