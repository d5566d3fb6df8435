from __future__ import annotations

import pytest
import torch

from hybrid_engine import ops

LENGTHS = [(1, 1), (2, 7), (3, 63), (33, 257)]
lengths = pytest.mark.parametrize("shape", LENGTHS, ids=lambda s: "B{}-T{}".format(*s))
discounts = pytest.mark.parametrize("gamma_lam", [(1.0, 0.95), (0.9, 1.0), (0.99, 0.0)], ids=str)


@pytest.fixture
def make(rng):
    def arrays(batch, time):
        rewards, values = (torch.randn(batch, time, generator=rng) for _ in range(2))
        ends = torch.randint(0, time + 1, (batch,), generator=rng)
        ends[0] = time
        return rewards, values, torch.arange(time) < ends.unsqueeze(1)

    return arrays


def ten_lines(rewards, values, gamma, lam):
    """One response without padding, the definition as a sum over later deltas."""
    values = [*values, 0.0]
    deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(len(rewards))]
    return [
        sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, len(deltas)))
        for t in range(len(deltas))
    ]


@pytest.mark.isa
@lengths
@discounts
def test_gae_is_the_discounted_sum_of_deltas(run, make, shape, gamma_lam):
    rewards, values, mask = make(*shape)
    advantages, returns = run(ops.gae, rewards, values, mask, *gamma_lam)
    expected = torch.zeros(shape, dtype=torch.float64)
    for i, row in enumerate(mask):
        end = int(row.sum())
        found = ten_lines(rewards[i, :end].tolist(), values[i, :end].tolist(), *gamma_lam)
        expected[i, :end] = torch.tensor(found, dtype=torch.float64)
    bound = torch.finfo(torch.float32).eps * max(1.0, expected.abs().max().item())
    assert (advantages - expected).abs().max() <= bound
    assert (returns - torch.where(mask, expected + values, 0.0)).abs().max() <= 2 * bound


def test_gae_by_hand(run):
    """r = [1, 2], V = [10, 20], gamma 0.5, lam 0.5: deltas 1 + 10 - 10 = 1 and 2 - 20 = -18."""
    rewards, values = torch.tensor([[1.0, 2.0, 9.0]]), torch.tensor([[10.0, 20.0, 9.0]])
    mask = torch.tensor([[True, True, False]])
    advantages, returns = run(ops.gae, rewards, values, mask, 0.5, 0.5)
    assert advantages.tolist() == [[1 - 0.25 * 18, -18.0, 0.0]]
    assert returns.tolist() == [[6.5, 2.0, 0.0]]


def test_gae_padding_and_holes_change_nothing(run, make):
    rewards, values, _ = make(2, 5)
    every = torch.ones(2, 5, dtype=torch.bool)
    dense = run(ops.gae, rewards, values, every, 0.9, 0.8)
    places = torch.tensor([1, 2, 4, 7, 8])  # prompt, hole in the middle, padding
    wide_rewards, wide_values = (torch.full((2, 11), float("nan")) for _ in range(2))
    wide_rewards[:, places], wide_values[:, places] = rewards, values
    mask = torch.zeros(2, 11, dtype=torch.bool)
    mask[:, places] = True
    for wide, narrow in zip(
        run(ops.gae, wide_rewards, wide_values, mask, 0.9, 0.8), dense, strict=True
    ):
        assert torch.equal(wide[:, places], narrow)
        assert torch.equal(wide[~mask], torch.zeros(2 * 6))


@pytest.mark.isa
@lengths
@pytest.mark.parametrize("shift_mean", [True, False], ids=["centred", "keeps_mean"])
def test_whiten_has_mean_zero_and_variance_one(run, make, shape, shift_mean):
    x, _, mask = make(*shape)
    x = x * 3 + 100
    members = x[mask].double()
    x[~mask] = float("nan")
    out = run(ops.masked_whiten, x, mask, None, shift_mean)
    assert torch.equal(out[~mask], torch.zeros(int((~mask).sum())))
    variance = members.var() if len(members) > 1 else torch.zeros(())
    expected = (members - members.mean()) / (variance + 1e-8).sqrt()
    expected = expected if shift_mean else expected + members.mean()
    bound = torch.finfo(torch.float32).eps * expected.abs().max()
    assert (out[mask] - expected).abs().max() <= bound


def test_moments_of_shards_add_up(run, make):
    x, _, mask = make(6, 63)
    x[~mask] = float("nan")
    whole = run(ops.masked_whiten, x, mask)
    halves = [slice(0, 2), slice(2, 6)]
    moments = sum(run(ops.masked_moments, x[half], mask[half]) for half in halves)
    assert moments[0] == mask.sum()
    for half in halves:
        part = run(ops.masked_whiten, x[half], mask[half], moments)
        torch.testing.assert_close(part, whole[half], rtol=1e-6, atol=1e-6)


def test_nothing_in_the_mask(run):
    x, mask = torch.full((2, 3), float("nan")), torch.zeros(2, 3, dtype=torch.bool)
    assert torch.equal(run(ops.masked_whiten, x, mask), torch.zeros(2, 3))
    assert torch.equal(run(ops.masked_moments, x, mask), torch.zeros(3, dtype=torch.float64))
    for out in run(ops.gae, x, x, mask, 1.0, 0.95):
        assert torch.equal(out, torch.zeros(2, 3))


def test_empty(run):
    x, mask = torch.ones(0, 5), torch.ones(0, 5, dtype=torch.bool)
    assert [out.shape for out in run(ops.gae, x, x, mask, 1.0, 0.95)] == [(0, 5), (0, 5)]
    assert run(ops.masked_whiten, x, mask).shape == (0, 5)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rewards": torch.ones(6)}, r"rewards: expected \[any, any\], got \[6\]"),
        ({"rewards": torch.ones(2, 3).half()}, "rewards: expected float32, got float16"),
        ({"values": torch.ones(2, 4)}, r"values: expected \[2, 3\], got \[2, 4\]"),
        ({"values": torch.ones(3, 2).t()}, "values: expected a contiguous tensor"),
        ({"mask": torch.ones(2, 3)}, "mask: expected bool, got float32"),
    ],
    ids=["rank", "dtype", "size", "layout", "mask"],
)
def test_bad_input_names_argument_and_values(run, changed, message):
    args = {
        "rewards": torch.ones(2, 3),
        "values": torch.ones(2, 3),
        "mask": torch.ones(2, 3, dtype=torch.bool),
    }
    with pytest.raises((ValueError, RuntimeError), match=message):
        run(ops.gae, *(args | changed).values(), 1.0, 0.95)


def test_bad_moments(run):
    x, mask = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises((ValueError, RuntimeError), match="moments: expected float64, got float32"):
        run(ops.masked_whiten, x, mask, torch.ones(3))
    with pytest.raises((ValueError, RuntimeError), match=r"mask: expected \[2, 3\], got \[6\]"):
        run(ops.masked_whiten, x, mask.view(6))


def test_opcheck(make):
    rewards, values, mask = make(3, 7)
    torch.library.opcheck(ops.gae.overload, (rewards, values, mask, 0.9, 0.8))
    torch.library.opcheck(ops.masked_moments.overload, (rewards, mask))
    torch.library.opcheck(ops.masked_whiten.overload, (rewards, mask))
