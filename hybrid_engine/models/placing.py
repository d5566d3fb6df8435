"""From an HF model to the tensors of a rollout copy: which slices of which parameters go where."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hybrid_engine.models.cuts import Cut, heads_of, layer_cuts
from hybrid_engine.models.family import Family
from hybrid_engine.models.lora import active_adapters, base_of, check_plain, is_lora
from hybrid_engine.parallel import TensorParallel
from hybrid_engine.weights import LowRank, Piece, Placement, whole

ShapeOf = Callable[[nn.Parameter], tuple[int, ...]]
Groups = list[list[Placement]]  # the destinations of a group lie one after another


class Placing:
    """The placements of a model, layer by layer, and what differs in the copy's modules.

    Raises ValueError where tensor parallelism cannot divide the model.
    """

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        shape_of: ShapeOf,
        parallel: TensorParallel | None,
        *,
        dtype: torch.dtype | None,
        merge_lora: bool,
    ) -> None:
        self._dtype = dtype
        self._shape_of = shape_of
        self._merge_lora = merge_lora
        self._placed: dict[nn.Parameter, Placement] = {}
        self.instead: dict[nn.Module, nn.Module] = {}  # adapters that are merged, or off
        self.attributes: dict[nn.Module, dict[str, Any]] = {}
        config: Any = model.config
        heads = heads_of(config, parallel)
        self.layers: list[Groups] = []
        for layer in model.get_submodule(family.layers).children():
            self._cut(layer_cuts(layer, family, heads, config, parallel))
            self.layers.append(_grouped(self._take(layer), layer, family))
        self._merge_lora = False  # a tied head shares its weight with the embedding
        self.rest: Groups = [[p] for p in self._outside_layers(model, family, parallel)]

    @property
    def parameters(self) -> dict[nn.Parameter, nn.Parameter]:
        """The copy's parameter for each of the model's that is used."""
        return {source: placement.destination for source, placement in self._placed.items()}

    def _outside_layers(
        self, model: Any, family: Family, parallel: TensorParallel | None
    ) -> list[Placement]:
        head, embedding = model.get_output_embeddings(), model.get_submodule(family.embedding)
        if parallel:
            self._cut_vocabulary(head, embedding, parallel)
        paths = (family.final_norm, family.embedding_norm, family.position_embedding)
        others = [model.get_submodule(path) for path in paths if path]
        return self._take(embedding, head, *others)

    def _cut_vocabulary(self, head: Any, embedding: Any, parallel: TensorParallel) -> None:
        """Equal parts, the last ones padded."""
        for weight in (base_of(head).weight, embedding.weight):
            vocab, width = self._shape_of(weight)
            rows, padded = parallel.share(vocab), -(-vocab // parallel.size)
            self._place(weight, [Piece(rows, (0, width), 0)], (padded, width))
        if is_lora(head) and active_adapters(head):
            raise ValueError("tensor parallelism does not serve LoRA adapters of the head")
        if base_of(head).bias is not None:
            self._place(base_of(head).bias, [Piece(rows, (0, 1), 0)], (padded,))

    def _cut(self, cuts: dict[nn.Module, Cut]) -> None:
        for module, cut in cuts.items():
            base = base_of(module)
            shape = cut.shape(base)
            names = ("nx", "nf") if type(base) is Conv1D else ("out_features", "in_features")
            self.attributes[base] = dict(zip(names, shape, strict=True))
            self._place(base.weight, cut.weight(base), shape, self._merged(module))
            if base.bias is not None:
                outputs = shape[1] if type(base) is Conv1D else shape[0]
                self._place(base.bias, cut.bias(base), (outputs,))
            if is_lora(module) and module not in self.instead:
                self._cut_adapters(module, cut)

    def _cut_adapters(self, module: Any, cut: Cut) -> None:
        low, high = Cut(inputs=cut.inputs), Cut(outputs=cut.outputs)
        for name in module.lora_A:
            a, b = module.lora_A[name], module.lora_B[name]
            self._place(a.weight, low.weight(a), low.shape(a))
            self._place(b.weight, high.weight(b), high.shape(b))
            if b.bias is not None and cut.inputs is not None:
                raise ValueError(
                    "tensor parallelism does not serve LoRA adapters with a bias (lora_bias=True)"
                )
            if b.bias is not None:
                self._place(b.bias, high.bias(b), (high.shape(b)[0],))

    def _take(self, *roots: nn.Module) -> list[Placement]:
        """The placements of the modules' parameters; what is not placed yet is taken whole."""
        taken: dict[nn.Parameter, Placement] = {}
        left_out: set[nn.Module] = set()
        for module in (module for root in roots for module in root.modules()):
            if is_lora(module):
                weight = base_of(module).weight
                if weight not in self._placed:
                    self._place(weight, whole(self._shape_of(weight)), None, self._merged(module))
                if module in self.instead:
                    left_out |= set(module.modules()) - set(base_of(module).modules())
            if module in left_out:
                continue
            for parameter in module._parameters.values():
                if parameter is None:
                    continue
                if parameter not in self._placed:
                    self._place(parameter, whole(self._shape_of(parameter)))
                taken[parameter] = self._placed[parameter]
        return list(taken.values())

    def _place(
        self,
        source: nn.Parameter,
        pieces: list[Piece],
        to_shape: tuple[int, ...] | None = None,
        lora: LowRank | None = None,
    ) -> None:
        shape = self._shape_of(source)
        dtype = self._dtype or source.dtype
        empty = nn.Parameter(source.data.new_empty(0, dtype=dtype), requires_grad=False)
        self._placed[source] = Placement(source, shape, empty, to_shape or shape, pieces, lora)

    def _merged(self, module: nn.Module) -> LowRank | None:
        """What is merged into a LoRA layer's weight, which then stands `instead` of the layer."""
        if not is_lora(module):
            return None
        check_plain(module)
        layer: Any = module
        active = active_adapters(layer)
        if not active:
            self.instead[module] = base_of(module)
            return None
        a, b = layer.lora_A[active[0]], layer.lora_B[active[0]]
        if len(active) > 1 or b.bias is not None or not self._merge_lora:
            return None
        self.instead[module] = base_of(module)
        transposed = type(base_of(module)) is Conv1D
        return LowRank(a.weight, b.weight, float(layer.scaling[active[0]]), transposed)


def _grouped(placements: list[Placement], layer: nn.Module, family: Family) -> Groups:
    """What the decoder fuses by rows is one group; everything else is alone."""
    by_source = {placement.source: placement for placement in placements}
    groups: Groups = []
    for paths in (family.qkv, family.mlp_up):
        bases = [base_of(layer.get_submodule(path)) for path in paths]
        for name in ("weight", "bias"):
            sources = [getattr(base, name) for base in bases if getattr(base, name) is not None]
            group = [by_source.pop(source) for source in sources]
            if group:
                groups.append(group)
    return groups + [[placement] for placement in by_source.values()]
