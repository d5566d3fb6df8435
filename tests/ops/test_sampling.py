from __future__ import annotations

import math

import pytest
import torch

from hybrid_engine import ops
from hybrid_engine.ops.sampling import philox_uniform

VOCABS = [1, 7, 63, 257, 5003]
vocabs = pytest.mark.parametrize("vocab", VOCABS, ids=lambda v: f"V{v}")
fp32 = pytest.mark.parametrize("dtype", [torch.float32], ids=["fp32"])


def settings(rows, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, position=0):
    """Arguments after `logits`, the same for every row."""
    return {
        "temperature": torch.full((rows,), temperature),
        "top_k": torch.full((rows,), top_k),
        "top_p": torch.full((rows,), top_p),
        "min_p": torch.full((rows,), min_p),
        "seeds": torch.arange(rows) * 7919 + 13,
        "positions": torch.full((rows,), position),
    }


@pytest.fixture
def logits_of(rng, dtype):
    def make(rows, vocab, spread=3.0):
        return (torch.randn(rows, vocab, generator=rng) * spread).to(dtype)

    return make


def kept_mask(logits, temperature, top_k, top_p, min_p):
    """What the filters keep, the obvious way: sort, cut, scatter back. fp64, one row."""
    p = torch.softmax(logits.double() / temperature, -1)
    order = p.argsort(descending=True, stable=True)
    keep = torch.ones_like(p, dtype=torch.bool)
    if 0 < top_k < len(p):
        keep &= p >= p[order[top_k - 1]]
    if top_p < 1:
        ranked = torch.where(keep, p, 0.0)[order] / p[keep].sum()
        needed = int((ranked.cumsum(0) < top_p).sum()) + 1
        keep &= p >= p[order[min(needed, len(p)) - 1]]
    return keep & (p >= min_p * p.max())


def assert_inverts_the_distribution(tokens, logits, kept, temperature, seeds, positions):
    """Each token's interval of the distribution function holds its row's uniform.

    The interval is widened by what fp32 weights may be off: one rounding each.
    """
    weights = torch.where(kept, torch.softmax(logits.double() / temperature, -1), 0.0)
    ends = weights.cumsum(-1) / weights.sum(-1, keepdim=True)
    chosen = tokens.unsqueeze(1)
    width = weights.gather(1, chosen) / weights.sum(-1, keepdim=True)
    upper, lower = ends.gather(1, chosen), ends.gather(1, chosen) - width
    uniform = philox_uniform(seeds, positions).unsqueeze(1)
    slack = 8 * torch.finfo(torch.float32).eps
    assert (uniform >= lower - slack).all()
    assert (uniform <= upper + slack).all()
    assert (width > 0).all(), "a token that the filters drop was drawn"


def test_philox_known_answer():
    """Random123's published vector: key 0, counter 0 gives 6627e8d5 e169c58d ..."""
    first, second = 0x6627E8D5, 0xE169C58D
    expected = ((first >> 5) * 2**26 + (second >> 6)) / 2**53
    zero = torch.zeros(1, dtype=torch.int64)
    assert philox_uniform(zero, zero).item() == expected


@pytest.mark.isa
@vocabs
def test_greedy_takes_the_first_largest(run, logits_of, vocab):
    logits = logits_of(5, vocab)
    logits[1:, vocab // 2 :: 3] = 50.0
    tokens, logprobs, truncated = run(ops.sample, logits, *settings(5, 0.0).values())
    assert torch.equal(tokens, logits.float().argmax(-1))
    truth = torch.log_softmax(logits.double(), -1).gather(1, tokens[:, None])[:, 0]
    assert (logprobs - truth).abs().max() <= 4e-7 * max(1.0, truth.abs().max().item())
    assert torch.equal(truncated, torch.zeros(5))


FILTERS = {
    "none": {},
    "hot": {"temperature": 2.0},
    "cold": {"temperature": 0.1},
    "top_k1": {"top_k": 1},
    "top_k5": {"top_k": 5},
    "top_k_over": {"top_k": 10**6},
    "top_p0": {"top_p": 0.0},
    "top_p9": {"top_p": 0.9},
    "min_p": {"min_p": 0.1},
    "all": {"temperature": 0.7, "top_k": 40, "top_p": 0.8, "min_p": 0.02},
}


@pytest.mark.isa
@vocabs
@pytest.mark.parametrize("name", FILTERS)
def test_draws_by_inversion_from_what_the_filters_keep(run, logits_of, vocab, name):
    rows, filters = 33, {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | FILTERS[name]
    logits = logits_of(rows, vocab)
    kept = torch.stack([kept_mask(row, **filters) for row in logits])
    args = settings(rows, **filters)
    tokens, logprobs, truncated = run(ops.sample, logits, *args.values())
    temperature = filters["temperature"]
    assert_inverts_the_distribution(
        tokens, logits, kept, temperature, args["seeds"], args["positions"]
    )
    full = torch.log_softmax(logits.double() / temperature, -1)
    chosen = tokens.unsqueeze(1)
    mass = torch.where(kept, full.exp(), 0.0).sum(-1, keepdim=True).log()
    for actual, truth in (
        (logprobs, full.gather(1, chosen)),
        (truncated, full.gather(1, chosen) - mass),
    ):
        scale = max(1.0, (logits.float().abs().max() / temperature).item())
        assert (actual - truth[:, 0]).abs().max() <= 4 * torch.finfo(torch.float32).eps * scale


def test_frequencies_follow_the_softmax(run):
    """Chi-square of 20000 draws over 8 tokens: 7 degrees of freedom, 0.1 % quantile 24.3."""
    rows = 20000
    row = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, 0.5, -2.0, 1.5])
    tokens, _, _ = run(ops.sample, row.expand(rows, 8).contiguous(), *settings(rows).values())
    expected = torch.softmax(row, 0) * rows
    found = torch.bincount(tokens, minlength=8)
    assert ((found - expected) ** 2 / expected).sum() < 24.3


@fp32
def test_tokens_do_not_depend_on_the_batch_but_on_seed_and_position(run, logits_of):
    logits = logits_of(9, 257)
    args = settings(9)
    whole = run(ops.sample, logits, *args.values())
    alone = run(ops.sample, logits[4:5], *(value[4:5] for value in args.values()))
    for a, b in zip(whole, alone, strict=True):
        assert torch.equal(a[4:5], b)
    for changed in ({"positions": args["positions"] + 1}, {"seeds": args["seeds"] + 1}):
        assert not torch.equal(run(ops.sample, logits, *(args | changed).values())[0], whole[0])


@fp32
def test_rows_have_settings_of_their_own(run, logits_of):
    logits = logits_of(4, 257)
    args = settings(4)
    args["temperature"] = torch.tensor([0.0, 1.0, 0.5, 2.0])
    args["top_k"] = torch.tensor([0, 3, 0, 1])
    args["top_p"] = torch.tensor([1.0, 1.0, 0.3, 1.0])
    together = run(ops.sample, logits, *args.values())
    for i in range(4):
        alone = run(ops.sample, logits[i : i + 1], *(value[i : i + 1] for value in args.values()))
        assert [x[i].item() for x in together] == [x.item() for x in alone]
    assert together[0][3] == logits[3].argmax()


def test_repetition_penalty(run, logits_of):
    """Seen positive logits are divided, negative multiplied; logprobs stay unpenalised."""
    rows, vocab, penalty = 9, 63, 3.0
    logits = logits_of(rows, vocab)
    seen = torch.zeros(rows, vocab, dtype=torch.uint8)
    seen[:, ::2] = 1
    penalised = torch.where(logits > 0, logits.double() / penalty, logits.double() * penalty)
    penalised = torch.where(seen.bool(), penalised, logits.double())
    factor = torch.full((rows,), penalty)
    for temperature in (0.0, 1.0):
        args = settings(rows, temperature)
        tokens, logprobs, _ = run(ops.sample, logits, *args.values(), factor, seen)
        if temperature == 0:
            assert torch.equal(tokens, penalised.argmax(-1))
        else:
            every = torch.ones_like(seen, dtype=torch.bool)
            assert_inverts_the_distribution(
                tokens, penalised, every, 1.0, args["seeds"], args["positions"]
            )
        truth = torch.log_softmax(logits.double(), -1).gather(1, tokens[:, None])[:, 0]
        assert (logprobs - truth).abs().max() <= 4e-7 * max(1.0, truth.abs().max().item())


@fp32
def test_penalty_of_one_changes_nothing(run, logits_of):
    logits, args = logits_of(5, 63), settings(5)
    seen = torch.ones(5, 63, dtype=torch.uint8)
    with_penalty = run(ops.sample, logits, *args.values(), torch.ones(5), seen)
    for a, b in zip(with_penalty, run(ops.sample, logits, *args.values()), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_masked_and_huge_logits(run, dtype):
    """-inf is never drawn; logits far over 88 overflow nothing."""
    top = torch.finfo(dtype).max / 4
    logits = torch.full((64, 9), -math.inf, dtype=dtype)
    logits[:, 2:4] = top
    tokens, logprobs, truncated = run(ops.sample, logits, *settings(64).values())
    assert set(tokens.tolist()) == {2, 3}
    for actual in (logprobs, truncated):
        torch.testing.assert_close(actual, torch.full((64,), -math.log(2)), rtol=0, atol=1e-6)


def test_empty(run, logits_of):
    tokens, logprobs, truncated = run(ops.sample, logits_of(0, 9), *settings(0).values())
    assert (tokens.shape, tokens.dtype) == ((0,), torch.int64)
    assert (logprobs.shape, truncated.shape) == ((0,), (0,))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"logits": torch.full((3, 8), math.nan)}, "logits: NaN, or a row whose largest"),
        ({"logits": torch.full((3, 8), math.inf)}, "logits: NaN, or a row whose largest"),
        ({"logits": torch.full((3, 8), -math.inf)}, "logits: NaN, or a row whose largest"),
        ({"logits": torch.ones(8)}, r"logits: expected \[any, any\], got \[8\]"),
        ({"logits": torch.ones(3, 0)}, r"logits: expected at least one token, got \[3, 0\]"),
        ({"logits": torch.ones(8, 3).t()}, "logits: expected a contiguous tensor"),
        ({"top_k": torch.ones(3)}, "top_k: expected int64, got float32"),
        ({"seeds": torch.ones(4).long()}, r"seeds: expected \[3\], got \[4\]"),
        ({"repetition_penalty": torch.ones(3)}, "seen: needed with repetition_penalty"),
    ],
    ids=["nan", "inf", "minus_inf", "rank", "no_token", "layout", "dtype", "size", "unseen"],
)
def test_bad_input_names_argument_and_values(run, changed, message):
    args = {"logits": torch.ones(3, 8), **settings(3)} | changed
    with pytest.raises((ValueError, RuntimeError), match=message):
        run(ops.sample, *args.values())


def test_one_nan_among_many_rows_is_found(run):
    logits = torch.zeros(40, 300)
    logits[33, 299] = math.nan
    with pytest.raises((ValueError, RuntimeError), match="logits: NaN"):
        run(ops.sample, logits, *settings(40).values())


def test_opcheck(logits_of):
    torch.library.opcheck(ops.sample.overload, (logits_of(3, 9), *settings(3, top_k=2).values()))
