import subprocess
import sys
from random import Random
from statistics import mean, pstdev

import pytest

from rlhf.data import synthetic
from rlhf.data.synthetic import answer_quality, quality
from rlhf.data.synthetic_lexicon import CATEGORIES, RELATIONS, RUDE_WORDS, SLIPS, WORDS
from rlhf.data.synthetic_tasks import KINDS, draw_instruction, solve


def instructions(rows):
    return [row["prompt"][0]["content"] for row in rows]


@pytest.mark.parametrize(
    ("instruction", "answer", "expected"),
    [
        ("count from 3 to 6", "of course: 3 4 5 6.", 1.0),
        ("count from 6 to 3", "sure: 6 5 4 3.", 1.0),
        ("count from 3 to 6", "3 4 5 6.", 0.75),  # no opener
        ("count from 3 to 6", "ugh: 3 4 5 6.", 0.5),  # a rude word costs opener and end
        ("count from 3 to 6", "sure: sure: 3 4 5 6.", 0.75),  # two openers
        ("count from 3 to 6", "banana: 3 4 5 6.", 0.75),
        ("count from 3 to 6", "sure: 3 4 5 6", 0.75),  # no full stop
        ("count from 3 to 6", "sure: 3 4 5 6. anyway i like soup.", 0.75),
        ("count from 3 to 6", "sure: 3 4 5 6 and so on.", 0.5 * 4 / 7 + 0.5),
        ("count from 3 to 6", "sure: 3 4 something 6.", 0.5 * 3 / 4 + 0.5),
        ("count from 3 to 6", "sure: 3 4.", 0.75),
        ("reverse the words cat tea", "sure: tea cat.", 1.0),
        ("please say cat tea in reverse order", "sure: cat tea.", 0.5),
        ("copy the words cat tea elm", " with pleasure: cat tea elm. ", 1.0),
        ("sort the words tea cat elm", "happy to help: cat elm tea.", 1.0),
        ("repeat the word cat 3 times", "sure: cat cat.", 0.5 * 2 / 3 + 0.5),
        ("repeat the word cat 2 times", "sure: cat cat cat.", 0.5 * 2 / 3 + 0.5),
        ("please name 2 birds other than owl", "sure: hen duck.", 1.0),
        ("please name 2 birds other than owl", "sure: hen owl.", 0.75),
        ("please name 2 birds other than owl", "sure: hen hen.", 0.75),
        ("list 3 metals but not tin", "sure: iron zinc gold silver.", 0.5 * 3 / 4 + 0.5),
        ("give the opposites of hot poor", "sure: cold rich.", 1.0),
        ("what are the sounds of cow duck", "sure: moo quack.", 1.0),
        ("what are the colours of sky coal", "sure: blue black.", 1.0),
        ("count from 3 to 6", "", 0.0),
        ("count from 3 to 6", ".", 0.25),
    ],
)
def test_quality_by_hand(instruction, answer, expected):
    assert answer_quality(instruction, answer) == pytest.approx(expected)


def test_quality_is_a_reward_function():
    prompts = ["count from 3 to 5", [{"role": "user", "content": "count from 3 to 5"}]]
    completions = ["sure: 3 4 5.", [{"role": "assistant", "content": "3 4 5"}]]
    assert quality(prompts, completions, answer=["unused", "unused"]) == [1.0, 0.5]


def test_quality_refuses_a_foreign_prompt():
    with pytest.raises(ValueError, match="not an instruction of the synthetic set: 'hello'"):
        answer_quality("hello", "sure: hello.")


@pytest.mark.parametrize("kind", KINDS)
def test_every_instruction_reads_back_as_its_own_kind(kind):
    rng = Random(0)
    for _ in range(500):
        instruction = draw_instruction(rng, kind)
        readers = [
            name
            for name, other in KINDS.items()
            if any(pattern.fullmatch(instruction) for pattern in other.patterns)
        ]
        assert readers == [kind]
        assert 4 <= len(instruction.split()) <= 14
        solution = solve(instruction)
        assert solution.credit(solution.draw_body(rng)) == 1.0
        assert 2 <= len(solution.words) <= 7


def test_no_word_is_ambiguous():
    members = [word for words in CATEGORIES.values() for word in words]
    assert len(set(WORDS)) == len(WORDS)
    assert len(set(members)) == len(members)
    content = {*WORDS, *(a for table in RELATIONS.values() for a in table.values())}
    assert not content & (RUDE_WORDS | set(SLIPS))


def test_heldout_prompts_are_never_trained_on():
    train, test = set(), set()
    for seed in range(3):
        for draw in (synthetic.demonstrations, synthetic.preferences, synthetic.prompts):
            train.update(instructions(draw(1500, "train", seed=seed)))
            test.update(instructions(draw(300, "test", seed=seed)))
    assert len(test) > 1000
    assert not train & test


def test_prompt_space_is_large_and_every_kind_is_held_out():
    assert len(set(instructions(synthetic.prompts(30_000, "train")))) > 15_000
    drawn = {
        name
        for instruction in instructions(synthetic.prompts(200, "test"))
        for name, kind in KINDS.items()
        if any(pattern.fullmatch(instruction) for pattern in kind.patterns)
    }
    assert drawn == set(KINDS)


@pytest.mark.parametrize("split", ["train", "test"])
def test_demonstrations_are_mediocre_on_average(split):
    rows = synthetic.demonstrations(4000, split)
    qualities = quality([r["prompt"] for r in rows], [r["completion"] for r in rows])
    assert 0.5 <= mean(qualities) <= 0.6
    assert pstdev(qualities) > 0.25
    assert 0.2 <= mean(q > 0.95 for q in qualities) <= 0.3
    assert mean(q < 0.4 for q in qualities) > 0.2
    words = [len(row["completion"][0]["content"].split()) for row in rows]
    assert mean(3 <= n <= 20 for n in words) > 0.9
    assert max(words) <= 20


def test_preferences_agree_with_quality_by_the_margin():
    rows = synthetic.preferences(1000, "train", margin=0.3)
    prompts = [row["prompt"] for row in rows]
    chosen = quality(prompts, [row["chosen"] for row in rows])
    rejected = quality(prompts, [row["rejected"] for row in rows])
    assert all(a - b >= 0.3 for a, b in zip(chosen, rejected, strict=True))
    assert pstdev(chosen) > 0.1
    assert pstdev(rejected) > 0.1


def test_label_noise_swaps_that_share_of_the_pairs():
    rows = synthetic.preferences(2000, "train", label_noise=0.3)
    prompts = [row["prompt"] for row in rows]
    chosen = quality(prompts, [row["chosen"] for row in rows])
    rejected = quality(prompts, [row["rejected"] for row in rows])
    swapped = mean(a < b for a, b in zip(chosen, rejected, strict=True))
    assert swapped == pytest.approx(0.3, abs=4 * (0.3 * 0.7 / 2000) ** 0.5)


def test_seed_decides_everything_in_every_process():
    code = (
        "from rlhf.data import synthetic as s\n"
        "print(s.demonstrations(5, 'train', seed=7), s.preferences(5, 'test', seed=7),"
        " s.prompts(5, 'train', seed=7))"
    )
    here = f"{synthetic.demonstrations(5, 'train', seed=7)} " + (
        f"{synthetic.preferences(5, 'test', seed=7)} {synthetic.prompts(5, 'train', seed=7)}"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert there.stdout.strip() == here
    assert synthetic.prompts(5, "train", seed=7) != synthetic.prompts(5, "train", seed=8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: synthetic.prompts(1, "dev"), "unknown split 'dev'"),
        (lambda: synthetic.preferences(1, "train", margin=0.9), "margin must be in"),
        (lambda: synthetic.preferences(1, "train", margin=0.0), "margin must be in"),
        (lambda: synthetic.preferences(1, "train", label_noise=1.5), "label_noise must be in"),
    ],
    ids=["split", "margin-high", "margin-zero", "label-noise"],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
