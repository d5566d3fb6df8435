"""The harness itself: results come back by rank, and whatever goes wrong is told."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import RankError, run_ranks


def _sum_of_ranks(offset):
    total = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(total)
    return dist.get_rank(), total


@pytest.mark.parametrize("world", [2, 4], ids=lambda w: f"W{w}")
def test_results_by_rank(world):
    results = run_ranks(_sum_of_ranks, 10, world=world)
    expected = sum(range(world)) + 10 * world
    assert results == [(rank, torch.tensor([expected])) for rank in range(world)]


def _one_raises():
    if dist.get_rank() == 1:
        raise ValueError("the shoe pinches here")
    dist.barrier()


def _one_dies():
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def _sleeps():
    time.sleep(60)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (_one_raises, r"rank 1 failed[\s\S]*_one_raises[\s\S]*ValueError: the shoe pinches here"),
        (_one_dies, r"rank \d (died|failed)"),
        (_sleeps, r"rank \d died or hung[\s\S]*_sleeps"),
    ],
    ids=["raises", "dies", "hangs"],
)
def test_a_failure_ends_the_run_and_says_why(function, message):
    started = time.monotonic()
    with pytest.raises(RankError, match=message):
        run_ranks(function, timeout=3)
    assert time.monotonic() - started < 20
