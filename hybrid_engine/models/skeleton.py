"""A second tree of modules beside a model's own: same types, other parameters, no hooks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import nn

_HOOKS = [name for name in vars(nn.Module()) if "_hooks" in name]


def skeleton(
    module: nn.Module,
    parameters: Mapping[nn.Parameter, nn.Parameter],
    instead: Mapping[nn.Module, nn.Module],
    attributes: Mapping[nn.Module, dict[str, Any]],
) -> nn.Module:
    """A copy of the tree that shares everything but modules and parameters.

    Args:
        parameters: the copy's parameter for each of the tree's; one that is missing becomes None.
        instead: modules that are left out, and which of the tree is copied in their place.
        attributes: what else of a module's copy is different.
    """
    copies: dict[nn.Module, nn.Module] = {}

    def copy(module: nn.Module) -> nn.Module:
        module = instead.get(module, module)
        if module not in copies:
            twin = module.__class__.__new__(module.__class__)
            copies[module] = twin
            twin.__dict__.update(module.__dict__)
            for name in _HOOKS:
                twin.__dict__[name] = OrderedDict()
            twin.__dict__["_parameters"] = {
                name: None if parameter is None else parameters.get(parameter)
                for name, parameter in module._parameters.items()
            }
            twin.__dict__["_modules"] = {
                name: None if child is None else copy(child)
                for name, child in module._modules.items()
            }
            twin.__dict__.update(attributes.get(module, {}))
        return copies[module]

    return copy(module)
