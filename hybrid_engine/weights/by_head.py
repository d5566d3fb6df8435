"""A parameter whose rows the decoder wants in another order: a copy, refreshed at the flip."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def rows_by_head(rows: Tensor, heads: int) -> Tensor:
    """Rows stored [head, (q, k, v), head_dim], copied as [(q, k, v), head, head_dim]."""
    by_head = rows.view(heads, 3, -1, *rows.shape[1:])
    return by_head.transpose(0, 1).reshape(rows.shape)


class RowsByHead:
    """The QKV rows of one module, in the decoder's order."""

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
        self._buffer = rows_by_head(getattr(self._module, self._name).data, self._heads)

    def release(self) -> None:
        self._buffer = None
