"""How long a sequence a model can read: said before training, not in the middle of it."""

from __future__ import annotations

import sys
from typing import cast

import pyarrow
import pyarrow.compute
from datasets import Dataset
from torch import nn

_SEQUENCES = ("input_ids", "chosen_ids", "rejected_ids")
_ROWS_AT_ONCE = 1000


def positions_of(model: nn.Module) -> int:
    """Tokens that a model has positions for; more than any sequence has, if it knows no end."""
    return getattr(model.config, "max_position_embeddings", None) or sys.maxsize


def check_positions(
    rows: Dataset, model: nn.Module, *, option: str, max_new_tokens: int = 0
) -> Dataset:
    """The encoded rows, if the model has positions for the longest and for a response to it.

    Learned positions end in an index error, rotary ones go on where nothing was ever learned.

    Args:
        option: the data section that the rows are of, which the error names.

    Raises ValueError that says what to do.
    """
    positions, longest = positions_of(model), _longest(rows)
    if longest + max_new_tokens > positions:
        response = f" and responses of {max_new_tokens}" if max_new_tokens else ""
        room = positions - max_new_tokens
        advice = (
            f"set it to {room} or less, or take a model with more"
            if room > 0
            else "lower max_new_tokens, or take a model with more"
        )
        raise ValueError(
            f"{option}.max_length: rows of {longest} tokens{response}, the model has {positions} "
            f"positions: {advice}"
        )
    return rows


def _longest(rows: Dataset) -> int:
    """Tokens of the longest sequence."""
    longest = 0
    names = [name for name in _SEQUENCES if name in rows.column_names]
    for batch in rows.select_columns(names).with_format("arrow").iter(_ROWS_AT_ONCE):
        for column in cast(pyarrow.Table, batch).columns:
            lengths = pyarrow.compute.list_value_length(column)
            longest = max(longest, pyarrow.compute.max(lengths).as_py())
    return longest
