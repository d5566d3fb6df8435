"""Gradient checkpointing: layers whose activations are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def recompute_activations(module: nn.Module) -> None:
    """Keep only the inputs of the module's transformer layers until the backward pass.

    Unlike HF's own switch it holds in eval mode too, which PPO trains in, and never where no
    gradient is wanted, so neither in rollouts nor in scoring. Raises ValueError for a model that
    has no such layers.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [layer for layer in module.modules() if isinstance(layer, GradientCheckpointingLayer)]
    if not layers:
        raise ValueError(
            f"training.gradient_checkpointing: {type(module).__name__} has no layers to recompute"
        )
    for layer in layers:
        layer.forward = _recomputed(layer.forward)
    module.recomputes_activations = True  # type: ignore[assignment]  # told to the forward passes


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return call
