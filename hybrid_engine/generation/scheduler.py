"""Continuous batching: who runs, who waits, and who gives way when the cache is full."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from hybrid_engine.cache import BlockAllocator, PrefixIndex


@dataclass
class Sequence:
    """One prompt on its way. `tokens` grows by the response only when the sequence is preempted."""

    index: int  # its place in the caller's list
    prompt: list[int]
    response: list[int] = field(default_factory=list)  # what was generated before a preemption
    blocks: list[int] = field(default_factory=list)
    cached: int = 0  # tokens whose keys and values are there at admission, in shared blocks
    twin: Sequence | None = field(default=None, repr=False)  # admitted with it, same prompt

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
        self._prefixes = PrefixIndex(block_size)
        self._block_size = block_size
        self._max_running = max_running
        self._max_prefill_tokens = max_prefill_tokens

    @property
    def done(self) -> bool:
        return not self.waiting and not self.running

    @property
    def free_blocks(self) -> int:
        return self._allocator.num_free

    @property
    def spare_blocks(self) -> int:
        """Free blocks that neither the growth of others nor the next to enter will need."""
        entering = self._blocks_for(len(self.waiting[0].tokens)) if self.waiting else 0
        return max(0, self._allocator.num_free - len(self.running) - entering)

    def admit(self) -> list[Sequence]:
        """Move waiting sequences to the end of `running`; they have blocks for their tokens.

        While others run, one block each stays free for their growth, so that admitting one does
        not preempt another at once. A sequence shares the full blocks of a beginning that is
        cached. One whose whole prompt is admitted in the same call has that sequence as its
        `twin`: nothing of it needs computing, only a last block that is partly filled, copying.
        """
        admitted: list[Sequence] = []
        fresh: dict[tuple[int, ...], Sequence] = {}  # by prompt, of those without a response
        budget = self._max_prefill_tokens
        while self.waiting and len(self.running) < self._max_running:
            sequence = self.waiting[0]
            tokens = sequence.tokens
            twin = None if sequence.response else fresh.get(tuple(tokens))
            shared, cached = self._shared_blocks(tokens, twin)
            needed = self._blocks_for(len(tokens)) - len(shared)
            reserve, work = len(self.running), len(tokens) - cached
            if needed + reserve > self._allocator.num_free or (admitted and work > budget):
                break
            self.waiting.popleft()
            self._allocator.share(shared)
            sequence.blocks = shared + self._allocator.allocate(needed)
            sequence.cached, sequence.twin = cached, twin
            self._prefixes.add(tokens, sequence.blocks)
            budget -= work
            admitted.append(sequence)
            self.running.append(sequence)
            if not sequence.response:
                fresh.setdefault(tuple(tokens), sequence)
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

    def cancel(self, index: int) -> tuple[bool, int | None]:
        """Drop a sequence: whether it was still there, and the row that it ran in.

        The last row moves into that row's place.
        """
        for row, sequence in enumerate(self.running):
            if sequence.index == index:
                self._remove(row)
                return True, row
        kept = deque(sequence for sequence in self.waiting if sequence.index != index)
        was_waiting = len(kept) < len(self.waiting)
        self.waiting = kept
        return was_waiting, None

    def _remove(self, row: int) -> Sequence:
        sequence = self.running[row]
        self._prefixes.forget(self._allocator.free(sequence.blocks))
        sequence.blocks = []
        sequence.twin = None
        last = self.running.pop()
        if last is not sequence:
            self.running[row] = last
        return sequence

    def _shared_blocks(self, tokens: list[int], twin: Sequence | None) -> tuple[list[int], int]:
        """Blocks to share, and the tokens of the sequence that need no computing."""
        if twin is not None:
            return twin.blocks[: len(tokens) // self._block_size], len(tokens)
        blocks = self._prefixes.match(tokens[:-1])  # the last token's hidden state is needed
        return blocks, len(blocks) * self._block_size

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._block_size)
