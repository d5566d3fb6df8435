"""What a decoder layer is made of, each reading the live parameters of HF modules."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hybrid_engine import ops
from hybrid_engine.models.family import Family
from hybrid_engine.models.lora import ActiveAdapters, Lora, base_of
from hybrid_engine.weights import FusedParameters, RowsByHead


class Linear:
    """One linear module. GPT-2's Conv1D stores the transpose, which is read as such."""

    def __init__(self, module: nn.Module) -> None:
        self._module = plain(base_of(module), nn.Linear, Conv1D)
        self._transposed = type(self._module) is Conv1D
        self._lora = Lora([module])

    def refresh(self) -> None:
        """See the parameters as they are now."""
        self._lora.refresh()

    def release(self) -> None:
        """Give back what was taken of the model."""
        self._lora.refresh()

    @property
    def weight(self) -> Tensor:
        """(out, in)"""
        weight: Tensor = self._module.weight
        return weight.t() if self._transposed else weight

    @property
    def bias(self) -> Tensor | None:
        return self._module.bias

    def adapters(self) -> ActiveAdapters:
        """The adapters that are active now, with the bias."""
        return self._lora.active(self.bias, self.weight.dtype)

    def product(self, x: Tensor) -> Tensor:
        """x W^T with the adapters' part, without the bias."""
        return self._apply(x, None)

    def __call__(self, x: Tensor) -> Tensor:
        return self._apply(x, self.bias)

    def _apply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self._lora:
            return self._lora.linear(x, self.weight, bias)
        return F.linear(x, self.weight, bias)


class FusedLinear(Linear):
    """Linear modules with one input as one matrix product, over parameters in one buffer."""

    def __init__(self, weight: Any, bias: Any | None, lora: Lora) -> None:
        self._weight = weight  # FusedParameters or RowsByHead
        self._bias = bias
        self._lora = lora

    def refresh(self) -> None:
        super().refresh()
        self._weight.refresh()
        if self._bias:
            self._bias.refresh()

    def release(self) -> None:
        super().release()
        self._weight.release()
        if self._bias:
            self._bias.release()

    @property
    def weight(self) -> Tensor:
        return self._weight.buffer

    @property
    def bias(self) -> Tensor | None:
        return self._bias.buffer if self._bias else None


def stacked(modules: list[nn.Module]) -> Linear:
    """The modules' outputs side by side."""
    if len(modules) == 1:
        return Linear(modules[0])
    bases = [plain(base_of(module), nn.Linear) for module in modules]
    biased = [base for base in bases if base.bias is not None]
    if 0 < len(biased) < len(bases):
        raise ValueError("the hybrid engine fuses linear layers with a bias each, or none at all")
    bias = FusedParameters(biased, "bias") if biased else None
    return FusedLinear(FusedParameters(bases, "weight"), bias, Lora(modules))


def stacked_qkv(modules: list[nn.Module], family: Family, heads: int) -> Linear:
    """Queries, then keys, then values."""
    if not family.qkv_rows_by_head:
        return stacked(modules)
    module = plain(base_of(modules[0]), nn.Linear)
    bias = RowsByHead(module, "bias", heads=heads) if module.bias is not None else None
    weight = RowsByHead(module, "weight", heads=heads)
    return FusedLinear(weight, bias, Lora(modules, heads=heads))


class Norm:
    """A norm module through the fused ops, alone or after adding to the residual in place."""

    def __init__(self, module: nn.Module, family: Family) -> None:
        self._module: Any = module
        self._is_rms = family.norm == "rms"
        self._offset = family.norm_weight_offset
        self._eps = norm_eps(module)

    def __call__(self, x: Tensor) -> Tensor:
        if self._is_rms:
            return ops.rms_norm(x, self._module.weight, self._eps, self._offset)
        return ops.layer_norm(x, self._module.weight, self._module.bias, self._eps)

    @property
    def weight(self) -> Tensor:
        return self._module.weight

    @property
    def bias(self) -> Tensor | None:
        return None if self._is_rms else self._module.bias

    @property
    def eps(self) -> float:
        return self._eps

    def after_adding(self, x: Tensor, residual: Tensor) -> Tensor:
        if self._is_rms:
            return ops.add_rms_norm(x, residual, self._module.weight, self._eps, self._offset)
        return ops.add_layer_norm(x, residual, self._module.weight, self._module.bias, self._eps)


class DecoderLayer:
    """The parts of one layer, resolved from the family's paths."""

    def __init__(self, layer: nn.Module, family: Family, config: Any, index: int) -> None:
        def norm(path: str | None) -> Norm | None:
            return Norm(find(path), family) if path else None

        find = finder(layer)
        self.attention_norm = Norm(find(family.attention_norm), family)
        self.qkv = stacked_qkv(
            [find(path) for path in family.qkv], family, config.num_attention_heads
        )
        self.query_norm: Any = find(family.query_norm) if family.query_norm else None
        self.key_norm: Any = find(family.key_norm) if family.key_norm else None
        self.attention_output = Linear(find(family.attention_output))
        self.attention_output_norm = norm(family.attention_output_norm)
        self.mlp_norm = Norm(find(family.mlp_norm), family)
        self.mlp_up = stacked([find(path) for path in family.mlp_up])
        self.mlp_down = Linear(find(family.mlp_down))
        self.mlp_output_norm = norm(family.mlp_output_norm)
        self.window = family.window(config, index)

    @property
    def linears(self) -> list[Linear]:
        return [self.qkv, self.attention_output, self.mlp_up, self.mlp_down]


def finder(module: nn.Module) -> Callable[[str], Any]:
    """`module.get_submodule`, with a ValueError where nothing has that path."""

    def find(path: str) -> Any:
        try:
            return module.get_submodule(path)
        except AttributeError as error:
            raise ValueError(
                f"{type(module).__name__} has no {path}, where its family keeps it: a module is "
                "wrapped or replaced, or the table is wrong"
            ) from error

    return find


def norm_eps(module: Any) -> float:
    """HF has it under two names. ValueError for a module that is no norm."""
    eps = getattr(module, "eps", getattr(module, "variance_epsilon", None))
    if eps is None:
        raise ValueError(f"the hybrid engine reads norms, found {type(module).__name__}")
    return float(eps)


def plain(module: nn.Module, *kinds: type[nn.Module]) -> Any:
    """The module, if its forward does nothing but use its parameters: no adapter, no quantiser."""
    if type(module) not in kinds:
        raise ValueError(
            f"the hybrid engine reads plain {kinds[0].__name__} layers, found "
            f"{type(module).__name__}"
        )
    return module


ActivationKind = Literal["silu", "gelu", "gelu_tanh", "relu"]

_ACTIVATIONS: dict[str, ActivationKind] = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh", "relu": "relu",
}  # fmt: skip


def activation_kind(name: str, *, gated: bool) -> ActivationKind:
    """The maths behind HF's name of an activation. ValueError when no kernel computes it."""
    kind = _ACTIVATIONS.get(name)
    if kind is None or kind == ("relu" if gated else "silu"):
        raise ValueError(f"the hybrid engine has no kernel for the activation {name!r}")
    return kind


def activation(kind: ActivationKind, *, gated: bool) -> Callable[[Tensor], Tensor]:
    """The op of an activation."""
    tanh = kind == "gelu_tanh"
    if gated:
        is_silu = kind == "silu"
        return ops.silu_and_mul if is_silu else functools.partial(ops.gelu_and_mul, tanh=tanh)
    return ops.relu if kind == "relu" else functools.partial(ops.bias_gelu, bias=None, tanh=tanh)
