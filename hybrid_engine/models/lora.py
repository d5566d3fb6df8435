"""PEFT's LoRA layers, read as they are: base weight, active adapters, switched off or merged."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def is_lora(module: nn.Module) -> bool:
    """Whether a module is a PEFT LoRA layer, without importing PEFT."""
    return hasattr(module, "base_layer") and hasattr(module, "lora_A")


def lora_of(module: nn.Module) -> LoraAdapters | None:
    """The adapters of a LoRA layer, None of any other. Raises ValueError for variants of LoRA."""
    return LoraAdapters(module) if is_lora(module) else None


def base_of(module: nn.Module) -> Any:
    """The layer under the adapters, or the module itself."""
    return module.base_layer if is_lora(module) else module


class LoraAdapters:
    """y += sum over active adapters of scaling * (x A^T) B^T, arXiv 2106.09685, eq. 3."""

    def __init__(self, module: Any) -> None:
        self._module = module
        variants = [name for name, used in module.use_dora.items() if used]
        if variants or getattr(module, "lora_variant", None):
            raise ValueError(
                "the hybrid engine serves plain LoRA; adapter "
                f"{', '.join(variants or module.lora_variant)} is a variant of it (such as DoRA)"
            )

    def add_to(self, out: Tensor, x: Tensor) -> None:
        """Add the adapters' part in place. x: (N, in), out: (N, out)."""
        module = self._module
        if module.disable_adapters or module.merged:  # merged: in the base weight already
            return
        for name in module.active_adapters:
            if name not in module.lora_A:
                continue
            down, up = module.lora_A[name], module.lora_B[name]
            low = F.linear(x.to(down.weight.dtype), down.weight)  # (N, R)
            out += (F.linear(low, up.weight, up.bias) * module.scaling[name]).to(out.dtype)
