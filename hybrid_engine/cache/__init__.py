"""The paged KV cache and its blocks."""

from hybrid_engine.cache.allocator import BlockAllocator, OutOfBlocksError
from hybrid_engine.cache.kv_cache import KVCache

__all__ = ["BlockAllocator", "KVCache", "OutOfBlocksError"]
