"""The instructions of the synthetic set: how each kind is drawn, read back and solved.

A kind is its wordings plus two functions: `draw` picks the blanks, `solve` finds the answer from
them. The wordings serve both ways, as text to fill in and as the pattern that reads it back, so a
score needs nothing but the prompt's text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from random import Random

from rlhf.data.synthetic_lexicon import CATEGORIES, NOUNS, RELATIONS, WORDS

Blanks = Mapping[str, str]


@dataclass(frozen=True)
class Solution:
    """What a right answer says."""

    words: tuple[str, ...]  # one right body
    members: tuple[str, ...] = ()  # if given, any len(words) distinct ones of these are right

    def draw_body(self, rng: Random) -> list[str]:
        """Return a right body; for an open question, one of many."""
        return rng.sample(self.members, len(self.words)) if self.members else list(self.words)

    def credit(self, body: list[str]) -> float:
        """Return the share of `body` that is right, in [0, 1].

        A closed question counts the words in their right place, an open one the distinct members;
        both divide by the longer of what was asked for and what was given.
        """
        if self.members:
            right = min(len(set(body) & set(self.members)), len(self.words))
        else:
            right = sum(given == wanted for given, wanted in zip(body, self.words, strict=False))
        return right / max(len(body), len(self.words))


@dataclass(frozen=True)
class Kind:
    """One kind of instruction."""

    wordings: tuple[str, ...]  # with {blanks}; `{words}` takes several words
    draw: Callable[[Random], Blanks]
    solve: Callable[[Blanks], Solution]

    @cached_property
    def patterns(self) -> tuple[re.Pattern[str], ...]:
        """The wordings as patterns that read the blanks back."""
        return tuple(
            re.compile(
                re.sub(
                    r"\{(\w+)\}",
                    lambda blank: (
                        rf"(?P<{blank[1]}>\w+( \w+)*)"
                        if blank[1] == "words"
                        else rf"(?P<{blank[1]}>\w+)"
                    ),
                    wording,
                )
            )
            for wording in self.wordings
        )


def _several(words: tuple[str, ...], rng: Random, fewest: int, most: int) -> str:
    return " ".join(rng.sample(words, rng.randint(fewest, most)))


def _draw_name(rng: Random) -> Blanks:
    category = rng.choice(tuple(CATEGORIES))
    return {
        "n": str(rng.randint(2, 5)),
        "category": category,
        "other": rng.choice(CATEGORIES[category]),
    }


def _solve_name(blanks: Blanks) -> Solution:
    members = tuple(w for w in CATEGORIES[blanks["category"]] if w != blanks["other"])
    return Solution(members[: int(blanks["n"])], members)


def _draw_repeat(rng: Random) -> Blanks:
    return {"n": str(rng.randint(2, 6)), "word": rng.choice(WORDS)}


def _draw_count(rng: Random) -> Blanks:
    low = rng.randint(1, 24)
    ends = [low, low + rng.randint(2, 6)]
    rng.shuffle(ends)
    return {"a": str(ends[0]), "b": str(ends[1])}


def _solve_count(blanks: Blanks) -> Solution:
    a, b = int(blanks["a"]), int(blanks["b"])
    step = 1 if a < b else -1
    return Solution(tuple(str(i) for i in range(a, b + step, step)))


def _draw_relation(rng: Random) -> Blanks:
    relation = rng.choice(tuple(RELATIONS))
    return {"relation": relation, "words": _several(tuple(RELATIONS[relation]), rng, 2, 3)}


def _solve_relation(blanks: Blanks) -> Solution:
    table = RELATIONS[blanks["relation"]]
    return Solution(tuple(table[word] for word in blanks["words"].split()))


KINDS: Mapping[str, Kind] = {
    "name": Kind(
        ("please name {n} {category} other than {other}", "list {n} {category} but not {other}"),
        _draw_name,
        _solve_name,
    ),
    "repeat": Kind(
        ("repeat the word {word} {n} times", "please say {word} {n} times"),
        _draw_repeat,
        lambda blanks: Solution((blanks["word"],) * int(blanks["n"])),
    ),
    "count": Kind(
        ("count from {a} to {b}", "please count from {a} to {b} for me"),
        _draw_count,
        _solve_count,
    ),
    "copy": Kind(
        ("copy the words {words}", "please say {words} in the same order"),
        lambda rng: {"words": _several(WORDS, rng, 2, 4)},
        lambda blanks: Solution(tuple(blanks["words"].split())),
    ),
    "reverse": Kind(
        ("reverse the words {words}", "please say {words} in reverse order"),
        lambda rng: {"words": _several(WORDS, rng, 2, 3)},
        lambda blanks: Solution(tuple(reversed(blanks["words"].split()))),
    ),
    "sort": Kind(
        ("sort the words {words}", "please say {words} in alphabetical order"),
        lambda rng: {"words": _several(NOUNS, rng, 2, 3)},
        lambda blanks: Solution(tuple(sorted(blanks["words"].split()))),
    ),
    "relation": Kind(
        ("give the {relation} of {words}", "what are the {relation} of {words}"),
        _draw_relation,
        _solve_relation,
    ),
}


def draw_instruction(rng: Random, kind: str) -> str:
    """Return one instruction of a kind."""
    chosen = KINDS[kind]
    return rng.choice(chosen.wordings).format(**chosen.draw(rng))


@lru_cache(maxsize=65536)
def solve(instruction: str) -> Solution:
    """Read an instruction back from its text and solve it.

    Raises ValueError for text that the generator cannot have written.
    """
    for kind in KINDS.values():
        for pattern in kind.patterns:
            if match := pattern.fullmatch(instruction):
                return kind.solve(match.groupdict())
    raise ValueError(
        f"not an instruction of the synthetic set: {instruction!r}; its quality is defined only"
        " for prompts that rlhf.data.synthetic generates"
    )
