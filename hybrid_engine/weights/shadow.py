"""A model's weights in another dtype, for rollouts of fewer bits than the training has."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_CHILDREN = ("_parameters", "_buffers", "_modules")


class Shadow:
    """A twin of a model: the same modules over parameters of another dtype.

    `refresh` copies the live parameters, in one pass; all else of the twin is the live model's:
    buffers, which adapters are active, the config. A parameter of that dtype is shared, not copied.
    The live model is only read.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        self._live = model
        self._dtype = dtype
        self._pairs: list[tuple[nn.Module, nn.Module]] = []  # live module, twin
        self._copies: list[tuple[nn.Parameter, nn.Parameter]] = []  # live, of the twin
        self._structure: tuple[list[nn.Module], list[nn.Parameter]] = ([], [])
        self.model: Any = _blank(model)
        self.refresh()

    @torch.no_grad()
    @torch.inference_mode(False)
    def refresh(self) -> None:
        """Follow the live model as it is now."""
        structure = (list(self._live.modules()), list(self._live.parameters()))
        if not _same(structure, self._structure):
            self._build()
            self._structure = structure
        for module, twin in self._pairs:
            children = {name: twin.__dict__[name] for name in _CHILDREN}
            twin.__dict__.update(module.__dict__)
            twin.__dict__.update(children, _buffers=dict(module._buffers))
        for live, copy in self._copies:
            if copy.shape != live.shape or copy.device != live.device:
                copy.data = torch.empty_like(live, dtype=self._dtype)
        if self._copies:
            lives, copies = zip(*self._copies, strict=True)
            torch._foreach_copy_(copies, lives)

    def release(self) -> None:
        """Free the copies; `refresh` makes them anew."""
        for _, copy in self._copies:
            copy.data = copy.new_empty(0)

    def _build(self) -> None:
        copies: dict[nn.Parameter, nn.Parameter] = {}  # tied parameters have one copy
        twins: dict[nn.Module, nn.Module] = {self._live: self.model}
        for module in self._live.modules():
            twins.setdefault(module, _blank(module))
        for module, twin in twins.items():
            twin.__dict__["_modules"] = {
                name: child if child is None else twins[child]
                for name, child in module._modules.items()
            }
            twin.__dict__["_parameters"] = {
                name: live if live is None else copies.setdefault(live, self._copy(live))
                for name, live in module._parameters.items()
            }
        self._pairs = list(twins.items())
        self._copies = [(live, copy) for live, copy in copies.items() if copy is not live]

    def _copy(self, live: nn.Parameter) -> nn.Parameter:
        if live.dtype == self._dtype or not live.is_floating_point():
            return live
        return nn.Parameter(live.new_empty(0, dtype=self._dtype), requires_grad=False)


def _same(found: tuple[list[Any], ...], known: tuple[list[Any], ...]) -> bool:
    """Whether both hold the same objects."""
    return [list(map(id, part)) for part in found] == [list(map(id, part)) for part in known]


def _blank(module: nn.Module) -> nn.Module:
    """A module of the same class that has nothing yet."""
    twin = object.__new__(type(module))
    twin.__dict__.update({name: {} for name in _CHILDREN})
    return twin
