"""The verifiable task: right answers, careless ones in their share, nothing held out leaks."""

from __future__ import annotations

import re

import pytest

from rlhf.data import arithmetic, load_rows
from rlhf.data.arithmetic import LARGEST, RIGHT_SHARE, exact_match


def summands(question: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+) \+ (\d+) =", question)
    assert match, question
    return int(match[1]), int(match[2])


def test_demonstrations_are_right_in_their_share_and_careless_else() -> None:
    rows = arithmetic.demonstrations(4000, "train")
    right = 0
    for row in rows:
        a, b = summands(row["prompt"])
        answer = int(row["completion"])
        right += answer == a + b
        assert answer in (a + b, a, b, a + 1, b + 1)
    assert right / len(rows) == pytest.approx(RIGHT_SHARE, abs=0.03)


def test_prompts_come_with_their_answers() -> None:
    rows = load_rows("arithmetic", purpose="prompts", split="train", max_rows=200)
    for row in rows:
        a, b = summands(row["prompt"])
        assert max(a, b) <= LARGEST
        assert row["answer"] == str(a + b)


def test_preferences_prefer_the_sum() -> None:
    for row in arithmetic.preferences(200, "test"):
        a, b = summands(row["prompt"])
        assert int(row["chosen"]) == a + b != int(row["rejected"])


@pytest.mark.parametrize("purpose", ["demonstrations", "preferences", "prompts"])
def test_held_out_sums_are_never_trained_on(purpose: str) -> None:
    sides = {
        split: {row["prompt"] for row in getattr(arithmetic, purpose)(3000, split, seed=1)}
        for split in ("train", "test")
    }
    assert not sides["train"] & sides["test"]
    assert len(sides["test"]) > 10


def test_seeds_repeat_and_differ() -> None:
    first, again, other = (arithmetic.prompts(50, "train", seed=s) for s in (0, 0, 1))
    assert first == again != other


def test_exact_match_is_exact() -> None:
    completions = ["7", " 7 ", "7.", "07", "seven", "", "17"]
    expected = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert exact_match([""] * 7, completions, answer=["7"] * 7) == expected
    message = [{"role": "assistant", "content": " 7"}]
    assert exact_match([""], [message], answer=["7"]) == [1.0]
    assert exact_match([""], [message], answer=[None]) == [None]
