"""Full blocks by what is in them, so that equal beginnings of prompts are cached once."""

from __future__ import annotations

from collections.abc import Iterator

# The block before it (-1: none), and its tokens. The block before stands for all that came before,
# because whoever holds a block holds the ones before it too.
_Key = tuple[int, tuple[int, ...]]


class PrefixIndex:
    """Finds the blocks that hold the beginning of a token sequence."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._blocks: dict[_Key, int] = {}
        self._keys: dict[int, _Key] = {}

    def match(self, tokens: list[int]) -> list[int]:
        """The blocks of the longest known beginning, in order."""
        found: list[int] = []
        for piece in self._pieces(tokens):
            block = self._blocks.get((found[-1] if found else -1, piece))
            if block is None:
                break
            found.append(block)
        return found

    def add(self, tokens: list[int], blocks: list[int]) -> None:
        """`blocks` hold, or are about to hold, `tokens`; a partly filled last one is left out."""
        before = -1
        for piece, block in zip(self._pieces(tokens), blocks, strict=False):
            key = (before, piece)
            before = self._blocks.setdefault(key, block)
            if before == block:
                self._keys[block] = key

    def forget(self, blocks: list[int]) -> None:
        """These blocks are free now."""
        for block in blocks:
            if key := self._keys.pop(block, None):
                del self._blocks[key]

    def _pieces(self, tokens: list[int]) -> Iterator[tuple[int, ...]]:
        size = self._block_size
        for start in range(0, len(tokens) - size + 1, size):
            yield tuple(tokens[start : start + size])
