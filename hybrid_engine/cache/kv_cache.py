"""The storage of keys and values: fixed blocks, so that no sequence needs contiguous memory."""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_engine.cache.pages import empty_pages


class KVCache:
    """Keys and values of all layers, each (num_blocks, K, block_size, D).

    A kv head's rows of one block are contiguous, which is how decode attention reads them.
    """

    def __init__(
        self,
        *,
        layers: int,
        num_blocks: int,
        kv_heads: int,
        block_size: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, 2, num_blocks, kv_heads, block_size, head_dim)
        self._storage = empty_pages(shape, dtype=dtype, device=device)
        self.layers: list[tuple[Tensor, Tensor]] = [(kv[0], kv[1]) for kv in self._storage]
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.device = device

    def copy_blocks(self, sources: list[int], destinations: list[int]) -> None:
        """Copy whole blocks, keys and values of all layers."""
        self._storage[:, :, destinations] = self._storage[:, :, sources]

    @staticmethod
    def bytes_per_block(
        *, layers: int, kv_heads: int, block_size: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        return 2 * layers * kv_heads * block_size * head_dim * dtype.itemsize
