"""Grade-school maths whose reference answer ends in "#### N": right or wrong."""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from typing import Any

from rlhf.data.formats import Message, last_content

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+")


def exact_answer(
    prompts: Sequence[Any],
    completions: Sequence[str | Sequence[Message]],
    answer: Sequence[str | int | float | None],
    **columns: Any,
) -> list[float | None]:
    """1.0 if the completion's final number is that of the `answer` column, else 0.0.

    The final number is the one after the last "####", or without that mark the last one. A row
    without a reference answer, or without a number in it, is skipped.
    """
    found = (final_number(last_content(completion)) for completion in completions)
    wanted = (final_number("" if gold is None else str(gold)) for gold in answer)
    return [
        None if right is None else float(given == right)
        for given, right in zip(found, wanted, strict=True)
    ]


def final_number(text: str) -> Decimal | None:
    """The last number of the text, or the first after the last "####"; None if there is none."""
    _, mark, tail = text.rpartition("####")
    numbers = _NUMBER.findall(tail)
    if not numbers:
        return None
    try:
        return Decimal((numbers[0] if mark else numbers[-1]).replace(",", ""))
    except InvalidOperation:
        return None
