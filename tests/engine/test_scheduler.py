"""Allocator and scheduler by their invariants: no block lost, first come, all finish."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from hybrid_engine.cache import BlockAllocator, OutOfBlocksError
from hybrid_engine.generation.scheduler import Scheduler, Sequence

BLOCKS = 12


class AllocatorMachine(RuleBasedStateMachine):
    """Any order of allocations and frees."""

    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(BLOCKS)
        self.held: list[list[int]] = []

    @rule(count=st.integers(0, BLOCKS + 1))
    def allocate(self, count: int) -> None:
        free = self.allocator.num_free
        if count > free:
            with pytest.raises(OutOfBlocksError, match=f"{count} blocks wanted, {free} free"):
                self.allocator.allocate(count)
        else:
            self.held.append(self.allocator.allocate(count))
            assert len(self.held[-1]) == count

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        blocks = data.draw(st.sampled_from(self.held))
        self.allocator.share(blocks)
        self.held.append(list(blocks))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.allocator.free(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @invariant()
    def none_lost_and_holders_counted(self) -> None:
        held = Counter(block for blocks in self.held for block in blocks)
        assert set(held) <= set(range(BLOCKS))
        assert all(self.allocator.holders(block) == held[block] for block in range(BLOCKS))
        assert self.allocator.num_free == BLOCKS - len(held)


AllocatorMachine.TestCase.settings = settings(max_examples=40, deadline=None)
TestAllocator = AllocatorMachine.TestCase


def test_a_block_freed_twice_is_our_mistake() -> None:
    allocator = BlockAllocator(4)
    blocks = allocator.allocate(2)
    allocator.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        allocator.free(blocks)


class Simulation:
    """Decoding without a model: every sequence takes the number of tokens that it was given."""

    def __init__(
        self, work: list[tuple[list[int], int]], *, block_size: int, spare: int, max_running: int,
        max_prefill_tokens: int,
    ) -> None:  # fmt: skip
        self.targets = [target for _, target in work]
        longest = max(-(-(len(prompt) + target) // block_size) for prompt, target in work)
        self.num_blocks = longest + spare
        self.allocator = BlockAllocator(self.num_blocks)
        self.scheduler = Scheduler(
            [prompt for prompt, _ in work], self.allocator, block_size=block_size,
            max_running=max_running, max_prefill_tokens=max_prefill_tokens,
        )  # fmt: skip
        self.block_size = block_size
        self.max_running = max_running
        self.max_prefill_tokens = max_prefill_tokens
        self.made = [0] * len(work)  # tokens generated so far
        self.cached: dict[int, int] = {}  # by index, of the running
        self.started: list[int] = []  # in the order of their first admission
        self.finished: list[int] = []
        self.preempted = 0
        self.memory: dict[int, int] = {}  # slot -> token

    def run(self) -> None:
        """The generate loop's use of the scheduler."""
        limit = 10 * (sum(self.targets) + len(self.targets)) ** 2
        for _ in range(limit):
            if self.scheduler.done:
                return
            self.prefill()
            self.check()
            self.decode()
            self.check()
        raise AssertionError(f"not finished after {limit} steps")

    def prefill(self) -> None:
        waiting = [sequence.index for sequence in self.scheduler.waiting]
        admitted = self.scheduler.admit()
        assert [sequence.index for sequence in admitted] == waiting[: len(admitted)]
        work = [len(sequence.tokens) - sequence.cached for sequence in admitted]
        assert len(admitted) <= 1 or sum(work) <= self.max_prefill_tokens
        self.write(admitted)
        first_row = len(self.scheduler.running) - len(admitted)
        assert self.scheduler.running[first_row:] == admitted
        for sequence in admitted:
            self.cached[sequence.index] = len(sequence.tokens)
            if sequence.index not in self.started:
                self.started.append(sequence.index)
            if self.made[sequence.index] == 0:
                self.made[sequence.index] = 1
        self.retire()

    def write(self, admitted: list[Sequence]) -> None:
        """A prefill writes what is not cached, and finds in shared blocks what it expects."""
        for sequence in admitted:
            tokens, size = sequence.tokens, self.block_size
            start = len(tokens) // size * size if sequence.twin else sequence.cached
            for i in range(start, len(tokens)):
                self.memory[sequence.blocks[i // size] * size + i % size] = tokens[i]
        for sequence in admitted:
            places = [self.place(sequence, i) for i in range(len(sequence.tokens))]
            assert [self.memory[place] for place in places] == sequence.tokens

    def place(self, sequence: Sequence, i: int) -> int:
        return sequence.blocks[i // self.block_size] * self.block_size + i % self.block_size

    def decode(self) -> None:
        row = 0
        while row < len(self.scheduler.running):
            sequence = self.scheduler.running[row]
            full = self.cached[sequence.index] == len(sequence.blocks) * self.block_size
            if full and self.scheduler.grow(row) is None:
                last = self.scheduler.running[-1].index
                self.scheduler.preempt_last([1] * self.made[last])
                del self.cached[last]
                self.preempted += 1
            else:
                row += 1
        for sequence in self.scheduler.running:
            next_block = sequence.blocks[self.cached[sequence.index] // self.block_size]
            assert self.allocator.holders(next_block) == 1, "a response goes into no shared block"
            self.memory[self.place(sequence, self.cached[sequence.index])] = 1
            self.cached[sequence.index] += 1
            self.made[sequence.index] += 1
        self.retire()

    def retire(self) -> None:
        running = self.scheduler.running
        ended = [r for r, s in enumerate(running) if self.made[s.index] >= self.targets[s.index]]
        for row in reversed(ended):
            sequence = self.scheduler.finish(row)
            assert sequence.blocks == []
            del self.cached[sequence.index]
            self.finished.append(sequence.index)

    def check(self) -> None:
        running = self.scheduler.running
        held = Counter(block for sequence in running for block in sequence.blocks)
        assert all(self.allocator.holders(block) == count for block, count in held.items())
        assert len(held) + self.allocator.num_free == self.num_blocks
        assert len(running) <= self.max_running
        assert {sequence.index for sequence in running} == set(self.cached)
        for sequence in running:
            assert self.cached[sequence.index] <= len(sequence.blocks) * self.block_size
        indices = sorted([s.index for s in running] + [s.index for s in self.scheduler.waiting])
        assert indices == sorted(set(range(len(self.made))) - set(self.finished))


# Few different tokens, so that many prompts begin alike or are the same.
PROMPTS = st.lists(st.integers(1, 2), min_size=1, max_size=20)


@settings(max_examples=150, deadline=None)
@given(
    work=st.lists(st.tuples(PROMPTS, st.integers(1, 20)), min_size=1, max_size=8),
    block_size=st.integers(1, 6),
    spare=st.integers(0, 8),
    max_running=st.integers(1, 5),
    max_prefill_tokens=st.integers(1, 40),
)
def test_every_sequence_finishes_and_no_block_is_lost(
    work: list[tuple[list[int], int]], block_size: int, spare: int, max_running: int,
    max_prefill_tokens: int,
) -> None:  # fmt: skip
    simulation = Simulation(
        work, block_size=block_size, spare=spare, max_running=max_running,
        max_prefill_tokens=max_prefill_tokens,
    )  # fmt: skip
    simulation.run()
    assert simulation.started == list(range(len(work)))  # first come, first served
    assert sorted(simulation.finished) == list(range(len(work)))
    assert simulation.made == simulation.targets
    assert simulation.allocator.num_free == simulation.num_blocks


def test_a_tight_cache_does_preempt() -> None:
    simulation = Simulation(
        [([i] * 4, 12) for i in range(4)],
        block_size=2,
        spare=1,
        max_running=4,
        max_prefill_tokens=100,
    )
    simulation.run()
    assert simulation.preempted > 0
    assert simulation.finished[0] == 0  # the oldest is never the one that gives way


def test_a_prompt_over_the_prefill_budget_runs_alone() -> None:
    scheduler = Scheduler(
        [[1] * 9, [2]], BlockAllocator(9), block_size=4, max_running=2, max_prefill_tokens=4
    )
    assert [sequence.index for sequence in scheduler.admit()] == [0]
    assert [sequence.index for sequence in scheduler.admit()] == [1]


def test_admission_leaves_a_block_for_each_running_sequence() -> None:
    """Else the newcomer would preempt, or be preempted, at once."""
    scheduler = Scheduler(
        [[1] * 4, [2] * 4, [3] * 4], BlockAllocator(3), block_size=4, max_running=3,
        max_prefill_tokens=100,
    )  # fmt: skip
    assert len(scheduler.admit()) == 2
    assert len(scheduler.waiting) == 1
