"""Which blocks of the KV cache are free."""

from __future__ import annotations


class OutOfBlocksError(RuntimeError):
    """No free block is left; the scheduler preempts a sequence and tries again."""


class BlockAllocator:
    """Hands out block numbers of a cache of fixed size, last freed first."""

    def __init__(self, num_blocks: int) -> None:
        self._free = list(range(num_blocks - 1, -1, -1))
        self._taken: set[int] = set()

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks, or OutOfBlocksError and none."""
        if count > len(self._free):
            raise OutOfBlocksError(f"{count} blocks wanted, {len(self._free)} free")
        blocks = [self._free.pop() for _ in range(count)]
        self._taken.update(blocks)
        return blocks

    def free(self, blocks: list[int]) -> None:
        for block in blocks:
            assert block in self._taken, f"block {block} is freed twice"
            self._taken.remove(block)
            self._free.append(block)
