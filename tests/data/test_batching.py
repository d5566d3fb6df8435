from collections import Counter
from itertools import islice
from random import Random

import pytest
import torch

from rlhf.data import LengthGroupedBatches, collate_right, length_mask, shuffled_batches


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


@pytest.mark.parametrize("rows", [1, 7, 63, 257, 1000])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_every_row_once_an_epoch(rows, batch_size):
    rng = Random(rows)
    batches = LengthGroupedBatches([rng.randint(1, 99) for _ in range(rows)], batch_size)
    epoch = list(batches.epoch(0))
    assert len(epoch) == len(batches)
    assert sorted(i for batch in epoch for i in batch) == list(range(rows))
    sizes = Counter(len(batch) for batch in epoch)
    assert sizes[batch_size] >= len(epoch) - 1


def test_order_depends_on_seed_and_epoch_only():
    lengths = list(range(1, 201))
    first = LengthGroupedBatches(lengths, 8, seed=3)
    again = LengthGroupedBatches(lengths, 8, seed=3)
    assert list(again.epoch(5)) == list(first.epoch(5))
    assert list(first.epoch(0)) != list(first.epoch(1))
    assert list(first.epoch(0)) != list(LengthGroupedBatches(lengths, 8, seed=4).epoch(0))
    assert {frozenset(batch) for batch in first.epoch(0)} != {
        frozenset(batch) for batch in first.epoch(1)
    }


def test_padding_is_little():
    rng = Random(0)
    lengths = [rng.randint(5, 200) for _ in range(2000)]

    def width(batches):
        return sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)

    grouped = width(LengthGroupedBatches(lengths, 16).epoch(0))
    unsorted = width([list(range(i, i + 16)) for i in range(0, 2000, 16)])
    assert grouped < 1.1 * sum(lengths) < unsorted


def test_short_rows_do_not_always_come_first():
    lengths = list(range(1, 513))
    batches = list(LengthGroupedBatches(lengths, 8).epoch(0))
    means = [sum(lengths[i] for i in batch) / len(batch) for batch in batches]
    assert means != sorted(means)


@pytest.mark.parametrize(
    ("lengths", "batch_size", "message"),
    [([], 4, "no rows"), ([1], 0, "batch_size must be at least 1, got 0")],
)
def test_bad_arguments(lengths, batch_size, message):
    with pytest.raises(ValueError, match=message):
        LengthGroupedBatches(lengths, batch_size)


def test_shuffled_batches_go_on_in_a_new_order_each_pass():
    drawn = list(islice(shuffled_batches(10, 3, seed=1), 6))
    assert drawn == list(islice(shuffled_batches(10, 3, seed=1), 6))
    assert all(len(batch) == 3 for batch in drawn)
    passes = [[i for batch in half for i in batch] for half in (drawn[:3], drawn[3:])]
    assert passes[0] != passes[1]
    assert all(len(set(rows)) == 9 for rows in passes)
    assert sorted(next(shuffled_batches(2, 8))) == [0, 1]
    with pytest.raises(ValueError, match="no rows"):
        next(shuffled_batches(0, 8))
