"""advantage.cu on the CPU: the tests of the ops, then rows and counts around a warp and a block."""

from __future__ import annotations

import pytest
import torch

from hybrid_engine import ops
from tests.ops import test_advantage as shared

FAMILY = "advantage"

make = shared.make
test_gae_is_the_discounted_sum_of_deltas = shared.test_gae_is_the_discounted_sum_of_deltas
test_gae_by_hand = shared.test_gae_by_hand
test_gae_padding_and_holes_change_nothing = shared.test_gae_padding_and_holes_change_nothing
test_whiten_has_mean_zero_and_variance_one = shared.test_whiten_has_mean_zero_and_variance_one
test_moments_of_shards_add_up = shared.test_moments_of_shards_add_up
test_nothing_in_the_mask = shared.test_nothing_in_the_mask
test_empty = shared.test_empty


@pytest.mark.parametrize("length", [31, 32, 33, 64, 100], ids=lambda t: f"T{t}")
def test_gae_with_holes_of_any_length(run, rng, length):
    """The tokens that precede and follow a token may be in other steps of the warp."""
    rewards, values = (torch.randn(9, length, generator=rng) for _ in range(2))
    mask = torch.rand(9, length, generator=rng) < torch.linspace(0.02, 1, 9).unsqueeze(1)
    mask[0] = False
    mask[0, [0, -1]] = True
    rewards[~mask] = values[~mask] = float("nan")
    found = run(ops.gae, rewards, values, mask, 0.97, 0.9)
    truth = ops.gae.reference(rewards, values, mask, 0.97, 0.9)
    for actual, expected in zip(found, truth, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_moments_of_many(run, rng):
    x = torch.randn(5001, generator=rng) + 3
    mask = torch.rand(5001, generator=rng) < 0.7
    moments = run(ops.masked_moments, x, mask)
    torch.testing.assert_close(moments, ops.masked_moments.reference(x, mask), rtol=1e-12, atol=0)
