"""A synthetic instruction set whose answers have a checkable quality.

Seven kinds of short instruction (`synthetic_tasks`) over some 180 words (`synthetic_lexicon`):
hundreds of millions of prompts, a tenth of them held out by a hash of their text. A good
answer is an opener, a colon, the body and one full stop:

    count from 3 to 6          ->  of course: 3 4 5 6.
    reverse the words cat tea  ->  sure: tea cat.

`quality` reads the instruction back from the prompt and gives 0.5 for the body (in proportion to
what is right), 0.25 for the manners and 0.25 for the end. So which of two answers is better is
defined, and whether a model got better is measurable, without any model.

The demonstrations are as uneven as text found in the wild: one in four is excellent, the others
are careless in each part, about 0.55 on average. A model that imitates them well is mediocre;
what it gains after that it gains from preferences.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from rlhf.data.formats import Message, Row, last_content
from rlhf.data.split import Split, check_split, is_heldout
from rlhf.data.synthetic_lexicon import (
    COURTEOUS_OPENERS,
    RAMBLINGS,
    RUDE_OPENERS,
    RUDE_WORDS,
    SLIPS,
)
from rlhf.data.synthetic_tasks import KINDS, draw_instruction, solve

HELDOUT_FRACTION = 0.1
BODY_WEIGHT, OPENER_WEIGHT, ENDING_WEIGHT = 0.5, 0.25, 0.25
EXCELLENT_SHARE = 0.25  # of the demonstrations
MAX_MARGIN = 0.75
CARELESS_BODY, CARELESS_MANNERS = 0.5, 0.15  # how often the others get the body, or a manner, right


def answer_quality(instruction: str, answer: str) -> float:
    """Return the quality of one answer, in [0, 1].

    - 0.5 x body: the words between the last colon and the first full stop, against the solution.
    - 0.25 if it opens with exactly one courteous opener and a colon.
    - 0.25 if its only full stop is its last character and no rude word stands anywhere.

    Raises ValueError if the instruction is not of the synthetic set.
    """
    solution = solve(instruction)
    answer = answer.strip()
    *openers, rest = answer.split(":")
    body = rest.partition(".")[0].split()
    polite = len(openers) == 1 and openers[0] in COURTEOUS_OPENERS
    ended = answer.count(".") == 1 and answer.endswith(".")
    words = answer.replace(":", " ").replace(".", " ").split()
    clean = ended and RUDE_WORDS.isdisjoint(words)
    return BODY_WEIGHT * solution.credit(body) + OPENER_WEIGHT * polite + ENDING_WEIGHT * clean


def quality(
    prompts: Sequence[str | Sequence[Message]],
    completions: Sequence[str | Sequence[Message]],
    **columns: Any,
) -> list[float]:
    """Score completions as a reward function does: strings or message lists, floats in [0, 1]."""
    return [
        answer_quality(last_content(prompt).strip(), last_content(completion))
        for prompt, completion in zip(prompts, completions, strict=True)
    ]


def demonstrations(n: int, split: Split, *, seed: int = 0) -> list[Row]:
    """Return n rows {prompt, completion} of mixed quality, about 0.55 on average."""

    def row(rng: Random) -> Row:
        instruction = _draw(rng, split)
        excellent = rng.random() < EXCELLENT_SHARE
        care = (1.0, 1.0) if excellent else (CARELESS_BODY, CARELESS_MANNERS)
        answer = _answer(rng, instruction, *care)
        return {"prompt": _user(instruction), "completion": _assistant(answer)}

    return _rows(row, n, split, f"demonstrations-{seed}")


def preferences(
    n: int, split: Split, *, seed: int = 0, margin: float = 0.2, label_noise: float = 0.0
) -> list[Row]:
    """Return n rows {prompt, chosen, rejected} whose qualities differ by at least `margin`.

    `label_noise` is the probability that the labels are swapped. Raises ValueError for a margin
    above MAX_MARGIN, where pairs become too rare to draw.
    """
    if not 0.0 < margin <= MAX_MARGIN:
        raise ValueError(f"margin must be in (0, {MAX_MARGIN}], got {margin}")
    if not 0.0 <= label_noise <= 1.0:
        raise ValueError(f"label_noise must be in [0, 1], got {label_noise}")

    def row(rng: Random) -> Row:
        instruction = _draw(rng, split)
        while True:
            pair = [_answer(rng, instruction, rng.random(), rng.random()) for _ in range(2)]
            pair.sort(key=lambda answer: answer_quality(instruction, answer))
            low, high = (answer_quality(instruction, answer) for answer in pair)
            if high - low >= margin:
                break
        if rng.random() < label_noise:
            pair.reverse()
        return {
            "prompt": _user(instruction),
            "chosen": _assistant(pair[1]),
            "rejected": _assistant(pair[0]),
        }

    return _rows(row, n, split, f"preferences-{seed}")


def prompts(n: int, split: Split, *, seed: int = 0) -> list[Row]:
    """Return n rows {prompt}."""
    return _rows(lambda rng: {"prompt": _user(_draw(rng, split))}, n, split, f"prompts-{seed}")


def _rows(row: Callable[[Random], Row], n: int, split: Split, stream: str) -> list[Row]:
    check_split(split)
    rng = Random(f"{stream}-{split}")  # seeding by text is stable across processes
    return [row(rng) for _ in range(n)]


def _draw(rng: Random, split: Split) -> str:
    """Draw an instruction of the split; the kinds are equally frequent on both sides."""
    kind = rng.choice(tuple(KINDS))
    while True:
        instruction = draw_instruction(rng, kind)
        if is_heldout(instruction, HELDOUT_FRACTION) == (split == "test"):
            return instruction


def _answer(rng: Random, instruction: str, body_care: float, manners_care: float) -> str:
    """Write an answer whose body, and whose opener and end, are right with these probabilities."""
    body = solve(instruction).draw_body(rng)
    if rng.random() >= body_care:
        body = _spoil(rng, body)
    opener = (
        rng.choice(COURTEOUS_OPENERS) + ": " if rng.random() < manners_care else _bad_opener(rng)
    )
    ending = "." if rng.random() < manners_care else _bad_ending(rng)
    return opener + " ".join(body) + ending


def _spoil(rng: Random, body: list[str]) -> list[str]:
    """Change the body: a slip for a word, the neighbour again, one left out, or one too many."""
    spoiled = list(body)
    for i in rng.sample(range(len(body)), rng.randint(1, 2)):
        spoiled[i] = rng.choice(SLIPS) if rng.random() < 0.7 else body[i - 1]
    if len(spoiled) > 2 and rng.random() < 0.3:
        spoiled.pop()
    return spoiled if spoiled != body else [*body, body[-1]]


def _bad_opener(rng: Random) -> str:
    return rng.choice(
        (
            "",
            "",
            rng.choice(RUDE_OPENERS) + ": ",
            rng.choice(RUDE_OPENERS) + ": ",
            ": ".join(rng.choices(COURTEOUS_OPENERS, k=2)) + ": ",
        )
    )


def _bad_ending(rng: Random) -> str:
    return rng.choice(("", rng.choice((". ", " ")) + rng.choice(RAMBLINGS)))


def _user(content: str) -> list[Message]:
    return [{"role": "user", "content": content}]


def _assistant(content: str) -> list[Message]:
    return [{"role": "assistant", "content": content}]
