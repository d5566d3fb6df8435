"""PEFT's LoRA layers, read as they are: base weight, active adapters, switched off or merged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid_engine import ops
from hybrid_engine.ops.linear import MAX_LORA_ADAPTERS
from hybrid_engine.weights import rows_by_head

# Rows up to which one fused pass beats a GEMM with the narrow products after it. Measured on a CPU
# at 288 x 864 and 768 x 2304, rank 8: bf16 1 row 25 against 47 us, 8 rows 94 against 67 us.
_FUSED_ROWS = {"cpu": 4, "cuda": 16}


def is_lora(module: nn.Module) -> bool:
    """Whether a module is a PEFT LoRA layer, without importing PEFT."""
    return hasattr(module, "base_layer") and hasattr(module, "lora_A")


def base_of(module: nn.Module) -> Any:
    """The layer under the adapters, or the module itself."""
    return module.base_layer if is_lora(module) else module


def active_adapters(module: Any) -> list[str]:
    """Whose part is to be added to the base layer's output."""
    if module.disable_adapters or module.merged:  # merged: in the base weight already
        return []
    return [name for name in module.active_adapters if name in module.lora_A]


@dataclass(frozen=True)
class ActiveAdapters:
    """Adapters of one layer, in the dtype of its input and over all of its outputs."""

    down: list[Tensor]  # (R, in) each
    up: list[Tensor]  # (out, R) each
    scales: list[float]
    bias: Tensor | None  # (out,), the layer's own and theirs


class Lora:
    """The adapters of modules with one input, whose outputs lie side by side.

    y = x W^T + b + sum over active adapters of scaling * (x A^T) B^T, arXiv 2106.09685, eq. 3.
    PEFT's own state is read at every call, so `disable_adapter()` and `set_adapter` are heeded.
    """

    def __init__(self, modules: list[nn.Module], *, heads: int | None = None) -> None:
        """`heads` is given when the rows of the one module are wanted by `rows_by_head`."""
        widths = [_width(base_of(module)) for module in modules]
        self._rows = sum(widths)
        self._heads = heads
        starts = [sum(widths[:i]) for i in range(len(widths))]
        self._adapted: list[tuple[Any, int]] = [
            (module, start) for module, start in zip(modules, starts, strict=True)
            if is_lora(module)
        ]  # fmt: skip
        self._placed: dict[tuple[int, str, str, torch.dtype], Tensor] = {}
        for module, _ in self._adapted:
            check_plain(module)

    def __bool__(self) -> bool:
        return bool(self._adapted)

    def refresh(self) -> None:
        """Forget the copies of adapters; the next call makes them of what they are then."""
        self._placed.clear()

    def active(self, bias: Tensor | None, dtype: torch.dtype) -> ActiveAdapters:
        """What the layer computes with now; `bias` is the layer's own."""
        active = [
            (place, name)
            for place, (module, _) in enumerate(self._adapted)
            for name in active_adapters(module)
        ]
        scales = [float(self._adapted[place][0].scaling[name]) for place, name in active]
        return ActiveAdapters(
            down=[self._narrow(place, name, dtype) for place, name in active],
            up=[self._wide(place, name, "weight", dtype) for place, name in active],
            scales=scales,
            bias=self._with_biases(bias, active, scales, dtype),
        )

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """(N, in) -> (N, out) with the active adapters."""
        active = self.active(bias, x.dtype)
        count = len(active.down)
        few = x.shape[0] <= _FUSED_ROWS.get(x.device.type, 0) and 0 < count <= MAX_LORA_ADAPTERS
        if few and weight.is_contiguous():
            return ops.fused_lora(x, weight, active.bias, active.down, active.up, active.scales)
        out = F.linear(x, weight, active.bias)
        for a, b, scale in zip(active.down, active.up, active.scales, strict=True):
            out.addmm_(F.linear(x, a), b.t(), alpha=scale)
        return out

    def _narrow(self, place: int, name: str, dtype: torch.dtype) -> Tensor:
        weight: Tensor = self._adapted[place][0].lora_A[name].weight
        if weight.dtype == dtype:
            return weight
        return self._kept((place, name, "down", dtype), lambda: weight.to(dtype))

    def _wide(self, place: int, name: str, part: str, dtype: torch.dtype) -> Tensor:
        """The rows of B, or of its bias, at their place among all rows; zero elsewhere."""
        module, start = self._adapted[place]
        rows: Tensor = getattr(module.lora_B[name], part)
        if rows.dtype == dtype and rows.shape[0] == self._rows and self._heads is None:
            return rows

        def placed() -> Tensor:
            moved = rows if self._heads is None else rows_by_head(rows, self._heads)
            out = moved.new_zeros(self._rows, *rows.shape[1:], dtype=dtype)
            out[start : start + len(rows)] = moved
            return out

        return self._kept((place, name, part, dtype), placed)

    def _kept(self, key: tuple[int, str, str, torch.dtype], make: Any) -> Tensor:
        if key not in self._placed:
            with torch.no_grad(), torch.inference_mode(False):
                self._placed[key] = make()
        return self._placed[key]

    def _with_biases(
        self, bias: Tensor | None, active: list[tuple[int, str]], scales: list[float],
        dtype: torch.dtype,
    ) -> Tensor | None:  # fmt: skip
        for (place, name), scale in zip(active, scales, strict=True):
            if self._adapted[place][0].lora_B[name].bias is not None:
                extra = self._wide(place, name, "bias", dtype) * scale
                bias = extra if bias is None else bias + extra
        return bias


def _width(base: Any) -> int:
    """Outputs of a Linear, or of GPT-2's Conv1D."""
    return base.out_features if isinstance(base, nn.Linear) else base.nf


def check_plain(module: Any) -> None:
    """Raises ValueError for variants of LoRA."""
    variants = [name for name, used in module.use_dora.items() if used]
    if variants or getattr(module, "lora_variant", None):
        raise ValueError(
            "the hybrid engine serves plain LoRA; adapter "
            f"{', '.join(variants or module.lora_variant)} is a variant of it (such as DoRA)"
        )
