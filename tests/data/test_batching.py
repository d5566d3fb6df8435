import json
from collections import Counter
from itertools import islice
from random import Random

import pytest
import torch

from rlhf.data import RowBatches, collate_right, length_mask


def test_collate_right_by_hand():
    input_ids, lengths = collate_right([[5, 6, 7], [8], []], 9)
    assert input_ids.tolist() == [[5, 6, 7], [8, 9, 9], [9, 9, 9]]
    assert lengths.tolist() == [3, 1, 0]
    assert input_ids.dtype == lengths.dtype == torch.int64


def test_mask_comes_from_lengths_though_text_holds_the_pad_id():
    input_ids, lengths = collate_right([[0, 0, 4], [0]], 0)
    assert length_mask(lengths, input_ids.shape[1]).tolist() == [
        [True, True, True],
        [True, False, False],
    ]


@pytest.mark.parametrize(("sequences", "shape"), [([], (0, 0)), ([[]], (1, 0)), ([[1]], (1, 1))])
def test_collate_right_of_little(sequences, shape):
    input_ids, lengths = collate_right(sequences, 0)
    assert input_ids.shape == shape
    assert input_ids.dtype == torch.int64
    assert length_mask(lengths, shape[1]).shape == shape


def grouped(lengths: list[int], batch_size: int, *, seed: int = 0) -> RowBatches:
    return RowBatches(len(lengths), batch_size, lengths=lengths, seed=seed)


def take(batches: RowBatches, epochs: int = 1) -> list[list[int]]:
    return list(islice(batches, epochs * len(batches)))


@pytest.mark.parametrize("by_length", [True, False], ids=["by-length", "plain"])
@pytest.mark.parametrize("rows", [1, 7, 63, 257, 1000])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_every_row_once_an_epoch(rows, batch_size, by_length):
    rng = Random(rows)
    lengths = [rng.randint(1, 99) for _ in range(rows)] if by_length else None
    batches = RowBatches(rows, batch_size, lengths=lengths)
    for _ in range(2):
        epoch = take(batches)
        assert sorted(i for batch in epoch for i in batch) == list(range(rows))
        sizes = Counter(len(batch) for batch in epoch)
        assert sizes[min(rows, batch_size)] >= len(epoch) - 1


def test_order_depends_on_seed_and_epoch_only():
    lengths = list(range(1, 201))
    first, second = (take(grouped(lengths, 8, seed=3), epochs=2) for _ in range(2))
    assert first == second
    one, two = first[:25], first[25:]
    assert one != two
    assert one != take(grouped(lengths, 8, seed=4))
    assert {frozenset(batch) for batch in one} != {frozenset(batch) for batch in two}


def test_padding_is_little():
    rng = Random(0)
    lengths = [rng.randint(5, 200) for _ in range(2000)]

    def width(batches):
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)

    by_length = width(take(grouped(lengths, 16)))
    unsorted = width(take(RowBatches(2000, 16)))
    assert by_length < 1.1 * sum(lengths) < unsorted


def test_short_rows_do_not_always_come_first():
    lengths = list(range(1, 513))
    means = [sum(lengths[i] for i in batch) / len(batch) for batch in take(grouped(lengths, 8))]
    assert means != sorted(means)


@pytest.mark.parametrize(
    ("rows", "batch_size", "lengths", "message"),
    [
        (0, 4, None, "no rows"),
        (1, 0, None, "batch_size must be at least 1, got 0"),
        (2, 1, [3], "lengths: expected one for each of 2 rows, got 1"),
    ],
)
def test_bad_arguments(rows, batch_size, lengths, message):
    with pytest.raises(ValueError, match=message):
        RowBatches(rows, batch_size, lengths=lengths)


def test_whole_batches_only():
    drawn = take(RowBatches(10, 3, whole=True, seed=1), epochs=2)
    assert len(drawn) == 6
    assert all(len(batch) == 3 for batch in drawn)
    passes = [[i for batch in half for i in batch] for half in (drawn[:3], drawn[3:])]
    assert passes[0] != passes[1]
    assert all(len(set(rows)) == 9 for rows in passes)
    assert sorted(next(RowBatches(2, 8, whole=True))) == [0, 1]


@pytest.mark.parametrize("stopped_after", [0, 1, 4, 5, 12], ids=lambda n: f"after-{n}")
def test_a_saved_position_goes_on_with_the_very_next_batch(stopped_after):
    """In the middle of an epoch, at its end, and in a later one."""
    lengths = [1 + i % 7 for i in range(33)]
    uninterrupted = take(grouped(lengths, 7), epochs=4)
    stopped = grouped(lengths, 7)
    assert list(islice(stopped, stopped_after)) == uninterrupted[:stopped_after]
    state = json.loads(json.dumps(stopped.state_dict()))
    next(stopped)  # what happens after the state was taken is not in it
    resumed = grouped(lengths, 7)
    resumed.load_state_dict(state)
    assert resumed.epoch == stopped_after // 5
    assert list(islice(resumed, 20 - stopped_after)) == uninterrupted[stopped_after:]


@pytest.mark.parametrize(
    "other", [(32, 7, 0), (33, 8, 0), (33, 7, 1)], ids=["rows", "size", "seed"]
)
def test_a_position_in_other_data_is_refused(other):
    rows, batch_size, seed = other
    state = RowBatches(33, 7).state_dict()
    with pytest.raises(ValueError, match="cannot go on in other data"):
        RowBatches(rows, batch_size, seed=seed).load_state_dict(state)
