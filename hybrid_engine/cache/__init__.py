"""The paged KV cache, its blocks, and which prompts share them."""

from hybrid_engine.cache.allocator import BlockAllocator, OutOfBlocksError
from hybrid_engine.cache.kv_cache import KVCache
from hybrid_engine.cache.memory import affordable_blocks, free_bytes
from hybrid_engine.cache.prefix import PrefixIndex

__all__ = [
    "BlockAllocator",
    "KVCache",
    "OutOfBlocksError",
    "PrefixIndex",
    "affordable_blocks",
    "free_bytes",
]
