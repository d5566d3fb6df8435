"""The running batch as tensors: row i holds what the next decode step of sequence i needs."""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_engine.generation.scheduler import Sequence
from hybrid_engine.models import DecoderBatch


class Rows:
    """Fixed tensors of `capacity` rows, of which the first `count` run."""

    def __init__(
        self,
        *,
        capacity: int,
        max_blocks: int,
        block_size: int,
        device: torch.device,
        vocab_size: int | None = None,
    ) -> None:
        """`vocab_size` is given when the rows must remember which tokens they have seen."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.count = 0
        self.tokens = zeros(capacity)  # fed next, not yet cached
        self.lengths = zeros(capacity)  # cached tokens
        self.steps = zeros(capacity)  # response tokens so far
        self.indices = zeros(capacity)  # the prompt's place in the caller's list
        self.seeds = zeros(capacity)
        self.room = zeros(capacity)  # tokens that the row's blocks hold
        self.block_tables = zeros(capacity, max_blocks, dtype=torch.int32)
        self.seen = None if vocab_size is None else zeros(capacity, vocab_size, dtype=torch.uint8)
        self._block_size = block_size
        self._blocks: list[int] = []  # how many each row has, for the host
        self.numbers = torch.arange(capacity, device=device)  # 0, 1, 2, ...

    def append(self, sequence: Sequence, *, seed: int = 0) -> None:
        """A new last row for a sequence whose tokens have just been cached."""
        row = self.count
        self.lengths[row] = len(sequence.tokens)
        self.steps[row] = len(sequence.response)
        self.indices[row] = sequence.index
        self.seeds[row] = seed
        self.room[row] = len(sequence.blocks) * self._block_size
        if sequence.response:
            self.tokens[row] = sequence.response[-1]
        blocks = torch.tensor(sequence.blocks, dtype=torch.int32)
        self.block_tables[row, : len(blocks)] = blocks
        self._blocks.append(len(blocks))
        if self.seen is not None:
            self.seen[row] = 0
            self.seen[row, sequence.prompt + sequence.response] = 1
        self.count += 1

    def remove(self, row: int) -> None:
        """Drop a row; the last one moves into its place."""
        self.count -= 1
        state = (self.tokens, self.lengths, self.steps, self.indices, self.seeds, self.room)
        for tensor in (*state, self.block_tables, self.seen):
            if tensor is not None:
                tensor[row] = tensor[self.count]
        self._blocks[row] = self._blocks[-1]
        self._blocks.pop()

    def needing_block(self) -> list[int]:
        """Rows whose next token has no block."""
        full = self.lengths[: self.count] >= self.room[: self.count]
        return full.nonzero().flatten().tolist()

    def add_block(self, row: int, block: int) -> None:
        """One more block at the row's end. Asks the device nothing: there are many rows."""
        self.block_tables[row, self._blocks[row]] = block
        self._blocks[row] += 1
        self.room[row] = self._blocks[row] * self._block_size

    def decode_batch(self) -> DecoderBatch:
        """One token of every running row. Each row has a block for it."""
        n = self.count
        lengths = self.lengths[:n]
        block = self.block_tables[self.numbers[:n], lengths // self._block_size]
        return DecoderBatch(
            tokens=self.tokens[:n],
            positions=lengths,
            slot_mapping=block * self._block_size + lengths % self._block_size,
            block_tables=self.block_tables[:n],
            seq_lens=(lengths + 1).int(),
        )

    def prefill_batch(self, sequences: list[Sequence], rows: list[int]) -> DecoderBatch:
        """The tokens of `sequences`, held by `rows`, that are not cached yet."""
        device = self.tokens.device
        lengths = [len(sequence.tokens) for sequence in sequences]
        counts = [n - sequence.cached for n, sequence in zip(lengths, sequences, strict=True)]
        tokens = [token for sequence in sequences for token in sequence.tokens[sequence.cached :]]
        positions = [
            i for n, sequence in zip(lengths, sequences, strict=True)
            for i in range(sequence.cached, n)
        ]  # fmt: skip
        slots = [slot for sequence in sequences for slot in self._new_slots(sequence)]
        ends = torch.tensor([0, *counts]).cumsum(0)
        return DecoderBatch(
            tokens=torch.tensor(tokens, device=device),
            positions=torch.tensor(positions, device=device),
            slot_mapping=torch.tensor(slots, device=device),
            block_tables=self.block_tables[rows],
            seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
            cu_seqlens=ends.to(torch.int32).to(device),
            max_query_len=max(counts),
        )

    def _new_slots(self, sequence: Sequence) -> list[int]:
        size = self._block_size
        places = range(sequence.cached, len(sequence.tokens))
        return [sequence.blocks[i // size] * size + i % size for i in places]
