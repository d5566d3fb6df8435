"""Which blocks of the KV cache are free, and how many sequences hold each of the others."""

from __future__ import annotations


class OutOfBlocksError(RuntimeError):
    """No free block is left; the scheduler preempts a sequence and tries again."""


class BlockAllocator:
    """Hands out block numbers of a cache of fixed size, last freed first."""

    def __init__(self, num_blocks: int) -> None:
        self._free = list(range(num_blocks - 1, -1, -1))
        self._holders: dict[int, int] = {}  # block -> sequences that hold it

    @property
    def num_free(self) -> int:
        return len(self._free)

    def holders(self, block: int) -> int:
        """How many hold the block; 0 if it is free."""
        return self._holders.get(block, 0)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one holder each, or OutOfBlocksError and none."""
        if count > len(self._free):
            raise OutOfBlocksError(f"{count} blocks wanted, {len(self._free)} free")
        blocks = [self._free.pop() for _ in range(count)]
        self._holders.update(dict.fromkeys(blocks, 1))
        return blocks

    def share(self, blocks: list[int]) -> None:
        """One more holder for each block."""
        for block in blocks:
            self._holders[block] += 1

    def free(self, blocks: list[int]) -> list[int]:
        """One holder less for each block; returns those that nobody holds any more."""
        freed = []
        for block in blocks:
            assert block in self._holders, f"block {block} is freed twice"
            self._holders[block] -= 1
            if self._holders[block] == 0:
                del self._holders[block]
                self._free.append(block)
                freed.append(block)
        return freed
