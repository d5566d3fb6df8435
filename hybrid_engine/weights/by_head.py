"""A parameter whose rows the decoder wants in another order: a copy, refreshed at the flip."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RowsByHead:
    """QKV rows stored [head, (q, k, v), head_dim], read as [(q, k, v), head, head_dim]."""

    def __init__(self, module: nn.Module, name: str, *, heads: int) -> None:
        self._module = module
        self._name = name  # "weight" or "bias"
        self._heads = heads
        self._buffer: Tensor | None = None

    @property
    def buffer(self) -> Tensor:
        """The parameter's shape, rows reordered."""
        assert self._buffer is not None, "refresh() comes first"
        return self._buffer

    @torch.inference_mode(False)
    def refresh(self) -> None:
        """Copy the parameter as it is now."""
        rows: Tensor = getattr(self._module, self._name).data
        by_head = rows.view(self._heads, 3, -1, *rows.shape[1:])
        self._buffer = by_head.transpose(0, 1).reshape(rows.shape)

    def release(self) -> None:
        self._buffer = None
