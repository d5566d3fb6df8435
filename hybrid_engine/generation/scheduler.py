"""Continuous batching: who runs, who waits, and who gives way when the cache is full."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hybrid_engine.cache import BlockAllocator


@dataclass
class Sequence:
    """One prompt on its way. `tokens` grows by the response only when the sequence is preempted."""

    index: int  # its place in the caller's list
    prompt: list[int]
    response: list[int] = field(default_factory=list)  # what was generated before a preemption
    blocks: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        """What a prefill has to cache: all but a response's last token, which is fed next."""
        return self.prompt + self.response[:-1]


class Scheduler:
    """Admits waiting sequences in order while there is a row, a token budget and cache for them."""

    def __init__(
        self,
        prompts: list[list[int]],
        allocator: BlockAllocator,
        *,
        block_size: int,
        max_running: int,
        max_prefill_tokens: int,
    ) -> None:
        self.waiting = deque(Sequence(i, prompt) for i, prompt in enumerate(prompts))
        self.running: list[Sequence] = []  # row i of the batch runs running[i]
        self._allocator = allocator
        self._block_size = block_size
        self._max_running = max_running
        self._max_prefill_tokens = max_prefill_tokens

    @property
    def done(self) -> bool:
        return not self.waiting and not self.running

    def admit(self) -> list[Sequence]:
        """Move waiting sequences to the end of `running`; they have blocks for their tokens.

        While others run, one block each stays free for their growth, so that admitting one does
        not preempt another at once.
        """
        admitted: list[Sequence] = []
        budget = self._max_prefill_tokens
        while self.waiting and len(self.running) < self._max_running:
            sequence = self.waiting[0]
            length = len(sequence.tokens)
            needed = self._blocks_for(length)
            reserve = len(self.running)
            if needed + reserve > self._allocator.num_free or (admitted and length > budget):
                break
            self.waiting.popleft()
            sequence.blocks = self._allocator.allocate(needed)
            budget -= length
            admitted.append(sequence)
            self.running.append(sequence)
        assert admitted or self.running or not self.waiting, "one sequence must always fit"
        return admitted

    def grow(self, row: int) -> int | None:
        """Give row's sequence one more block; None when the cache is full."""
        if self._allocator.num_free == 0:
            return None
        block = self._allocator.allocate(1)[0]
        self.running[row].blocks.append(block)
        return block

    def preempt_last(self, response: list[int]) -> None:
        """Send the last row back to the front of the queue, to be recomputed."""
        sequence = self._remove(len(self.running) - 1)
        sequence.response = response
        self.waiting.appendleft(sequence)

    def finish(self, row: int) -> Sequence:
        """Free the row's blocks. The last row moves into its place."""
        return self._remove(row)

    def _remove(self, row: int) -> Sequence:
        sequence = self.running[row]
        self._allocator.free(sequence.blocks)
        sequence.blocks = []
        last = self.running.pop()
        if last is not sequence:
            self.running[row] = last
        return sequence

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_size)
