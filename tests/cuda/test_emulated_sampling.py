"""sampling.cu on the CPU: the tests of the op, sized for 1024 threads to a row, then its own."""

from __future__ import annotations

import math

import pytest
import torch

from hybrid_engine import ops
from tests.cuda.layout import misaligned
from tests.ops import test_sampling as shared

FAMILY = "sampling"
DEFAULTS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}

logits_of = shared.logits_of
test_greedy_takes_the_first_largest = shared.test_greedy_takes_the_first_largest
test_rows_have_settings_of_their_own = shared.test_rows_have_settings_of_their_own
test_repetition_penalty = shared.test_repetition_penalty
test_tokens_do_not_depend_on_the_batch_but_on_seed_and_position = (
    shared.test_tokens_do_not_depend_on_the_batch_but_on_seed_and_position
)
test_penalty_of_one_changes_nothing = shared.test_penalty_of_one_changes_nothing
test_empty = shared.test_empty


def settings(filters):
    """Arguments after `logits`: a row for each of `filters`."""
    rows = [{**DEFAULTS, **row} for row in filters]
    columns = {name: torch.tensor([row[name] for row in rows]) for name in DEFAULTS}
    return {**columns, "seeds": torch.arange(len(rows)) + 5, "positions": torch.arange(len(rows))}


# 33000 is enough for a thread to search several tokens.
@pytest.mark.parametrize("vocab", [1, 7, 257, 5003, 33000], ids=lambda v: f"V{v}")
def test_draws_by_inversion_from_what_the_filters_keep(run, logits_of, vocab):
    filters = [{**DEFAULTS, **row} for row in shared.FILTERS.values()]
    logits, args = logits_of(len(filters), vocab), settings(filters)
    pairs = zip(logits, filters, strict=True)
    kept = torch.stack([shared.kept_mask(row, **values) for row, values in pairs])
    tokens, logprobs, truncated = run(ops.sample, logits, *args.values())
    temperature = args["temperature"].unsqueeze(1)
    shared.assert_inverts_the_distribution(
        tokens, logits, kept, temperature, args["seeds"], args["positions"]
    )
    full = torch.log_softmax(logits.double() / temperature, -1)
    mass = torch.where(kept, full.exp(), 0.0).sum(-1).log()
    truth = full.gather(1, tokens.unsqueeze(1)).squeeze(1)
    scale = (logits.double().abs().amax(1) / args["temperature"]).clamp(min=1)
    bound = 4 * torch.finfo(torch.float32).eps * scale
    assert ((logprobs - truth).abs() <= bound).all()
    assert ((truncated - (truth - mass)).abs() <= bound).all()


def test_what_the_filters_share_with_others_stays(run, dtype):
    """Of equal logits at a threshold, all stay or none: the draws cover exactly the ties."""
    logits = torch.full((12, 300), -9.0, dtype=dtype)
    logits[:, 100:103] = 2.0
    args = settings([{"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.9}] * 4)
    tokens, _, truncated = run(ops.sample, logits, *args.values())
    assert set(tokens.tolist()) == {100, 101, 102}
    torch.testing.assert_close(truncated, torch.full((12,), -math.log(3)), rtol=0, atol=1e-6)


def test_masked_and_huge_logits(run, dtype):
    """-inf is never drawn, nor is what is e^-40 as likely; huge logits overflow nothing."""
    logits = torch.full((8, 9), -math.inf, dtype=dtype)
    logits[:, 2:4] = torch.finfo(dtype).max / 4
    logits[4:] = -40.0
    logits[4:, 2:4] = 0.0
    tokens, logprobs, truncated = run(ops.sample, logits, *settings([{}] * 8).values())
    assert set(tokens.tolist()) == {2, 3}
    for actual in (logprobs, truncated):
        torch.testing.assert_close(actual, torch.full((8,), -math.log(2)), rtol=0, atol=1e-6)


def test_bad_rows_get_no_token_and_disturb_no_other(run, logits_of):
    good = logits_of(6, 300)
    args = settings([{}, {"temperature": 0.0}, {"top_k": 3}, {}, {}, {"temperature": 1e-45}])
    expected = run(ops.sample, good[:1], *(value[:1] for value in args.values()))
    bad = good.clone()
    bad[1, 299] = math.nan
    bad[2, 0] = math.inf
    bad[3] = -math.inf
    bad[4] = math.nan
    tokens, logprobs, truncated = run(ops.sample, bad, *args.values())
    assert tokens.tolist() == [expected[0].item(), *[-1] * 5]
    for actual, alone in ((logprobs, expected[1]), (truncated, expected[2])):
        assert actual[0] == alone
        assert actual[1:].isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_bad_rows_are_errors_where_contents_are_checked(logits_of, bad):
    logits = logits_of(3, 8)
    ops.sample.validate(logits, *settings([{}] * 3).values())
    logits[1, 7] = bad
    with pytest.raises(ValueError, match="logits: NaN, or a row whose largest"):
        ops.sample.validate(logits, *settings([{}] * 3).values())


def test_misaligned_rows_give_the_same_bits(run, logits_of):
    logits = logits_of(3, 512)
    args = settings([{}, {"top_k": 40, "top_p": 0.8}, {"min_p": 0.1}])
    seen = torch.zeros(3, 512, dtype=torch.uint8)
    seen[:, ::3] = 1
    extra = torch.full((3,), 1.5), seen
    expected = run(ops.sample, logits, *args.values(), *extra)
    actual = run(ops.sample, misaligned(logits), *args.values(), *extra)
    assert all(map(torch.equal, actual, expected))


@shared.fp32
def test_a_vocabulary_beyond_the_masses_is_refused(run, dtype):
    logits = torch.zeros(1, 2**21 + 1, dtype=dtype)
    with pytest.raises(RuntimeError, match="logits: expected at most 2097152 tokens, got 2097153"):
        run(ops.sample, logits, *settings([{}]).values())
