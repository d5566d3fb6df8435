"""Sums of two numbers: a task whose answers are right or wrong, for rewards that can be verified.

    17 + 25 =    ->    42

The demonstrations are right in 40 % of the rows, and in the others repeat a number of the question,
so a model that imitates them well is right about that often; the rest it gains from rewards. A
tenth of the sums is held out by a hash of their text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from rlhf.data.formats import Message, Row, last_content
from rlhf.data.split import Split, check_split, is_heldout

HELDOUT_FRACTION = 0.1
LARGEST = 19  # summand
RIGHT_SHARE = 0.4  # of the demonstrations


def demonstrations(n: int, split: Split, *, seed: int = 0) -> list[Row]:
    """Return n rows {prompt, completion}, RIGHT_SHARE of them right."""

    def row(rng: Random, a: int, b: int) -> Row:
        answer = a + b if rng.random() < RIGHT_SHARE else _careless(rng, a, b)
        return {"prompt": _question(a, b), "completion": f" {answer}"}

    return _rows(row, n, split, f"demonstrations-{seed}")


def preferences(n: int, split: Split, *, seed: int = 0) -> list[Row]:
    """Return n rows {prompt, chosen, rejected}: the right answer, and a careless one."""

    def row(rng: Random, a: int, b: int) -> Row:
        pair = {"chosen": f" {a + b}", "rejected": f" {_careless(rng, a, b)}"}
        return {"prompt": _question(a, b), **pair}

    return _rows(row, n, split, f"preferences-{seed}")


def prompts(n: int, split: Split, *, seed: int = 0) -> list[Row]:
    """Return n rows {prompt, answer}."""

    def row(rng: Random, a: int, b: int) -> Row:
        return {"prompt": _question(a, b), "answer": str(a + b)}

    return _rows(row, n, split, f"prompts-{seed}")


def exact_match(
    prompts: Sequence[Any],
    completions: Sequence[str | Sequence[Message]],
    answer: Sequence[str | None],
    **columns: Any,
) -> list[float | None]:
    """1.0 where the completion is the answer and nothing else, else 0.0: a reward function.

    None, skipped, where there is no answer: rows of another dataset in a mix.
    """
    return [
        None if right is None else float(last_content(completion).strip() == right.strip())
        for completion, right in zip(completions, answer, strict=True)
    ]


def _draw(rng: Random, split: Split) -> tuple[int, int]:
    while True:
        a, b = rng.randint(0, LARGEST), rng.randint(0, LARGEST)
        if is_heldout(_question(a, b), HELDOUT_FRACTION) == (split == "test"):
            return a, b


def _question(a: int, b: int) -> str:
    return f"{a} + {b} ="


def _careless(rng: Random, a: int, b: int) -> int:
    """A number of the question again, or the one after where that would be right."""
    number = rng.choice((a, b))
    return number if number != a + b else number + 1


def _rows(row: Callable[[Random, int, int], Row], n: int, split: Split, stream: str) -> list[Row]:
    check_split(split)
    rng = Random(f"arithmetic-{stream}-{split}")
    return [row(rng, *_draw(rng, split)) for _ in range(n)]
