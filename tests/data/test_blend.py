"""Several datasets as one, and one dataset divided among the steps."""

import json
import logging
from collections import Counter

import pytest
from datasets import Dataset

from rlhf.config import DataConfig, RunConfig, SourceConfig
from rlhf.data import DataBlend, blend, load_rows, shares_of
from rlhf.data.formats import prompt_text

PURPOSES = ("demonstrations", "preferences", "prompts")


def numbered(name: str, count: int) -> Dataset:
    return Dataset.from_list([{"from": name, "i": i} for i in range(count)])


def drawn(rows: Dataset) -> dict[str, Counter]:
    return {
        name: Counter(row["i"] for row in rows if row["from"] == name) for name in set(rows["from"])
    }


def write(path, rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_without_weights_every_row_comes_once() -> None:
    rows = blend([numbered("a", 30), numbered("b", 7)], None, rows=None)
    assert drawn(rows) == {"a": Counter(range(30)), "b": Counter(range(7))}
    assert list(rows["from"]) != sorted(rows["from"])  # mixed, not one after the other


@pytest.mark.parametrize("unit", [1, 0.01, 300])
def test_weights_are_shares_of_the_rows(unit: float) -> None:
    found = drawn(blend([numbered("a", 90), numbered("b", 10)], [unit, 3 * unit], rows=None))
    assert {name: sum(counts.values()) for name, counts in found.items()} == {"a": 25, "b": 75}
    assert set(found["a"].values()) == {1}  # a random part of the large one
    assert sorted(found["a"]) != list(range(25))
    assert sorted(found["b"].values()) == [7] * 5 + [8] * 5  # the small one again and again


@pytest.mark.parametrize(("rows", "expected"), [(1, 1), (10, 10), (1000, 1000)])
def test_weighted_rows_are_as_many_as_asked(rows: int, expected: int) -> None:
    assert len(blend([numbered("a", 20), numbered("b", 3)], [1, 1], rows=rows)) == expected


def test_unweighted_rows_are_at_most_all() -> None:
    parts = [numbered("a", 20), numbered("b", 4)]
    assert len(blend(parts, None, rows=1000)) == 24
    assert {n: sum(c.values()) for n, c in drawn(blend(parts, None, rows=12)).items()} == {
        "a": 10,
        "b": 2,
    }


def test_the_seed_decides() -> None:
    parts = [numbered("a", 50), numbered("b", 50)]
    first, again, other = (blend(parts, [1, 2], rows=60, seed=seed) for seed in (0, 0, 1))
    assert list(first) == list(again)
    assert list(first) != list(other)


def test_a_blend_of_different_formats(tmp_path, tokenizer) -> None:
    chat = [{"messages": [{"role": "user", "content": f"say {i}"},
                          {"role": "assistant", "content": "yes"}]} for i in range(40)]  # fmt: skip
    write(tmp_path / "text.jsonl", [{"text": f"the cat sat {i}"} for i in range(60)])
    config = DataConfig(
        mix=[
            SourceConfig(write(tmp_path / "chat.jsonl", chat), weight=3),
            SourceConfig(str(tmp_path / "text.jsonl"), weight=1),
        ],
        rows=80,
        max_length=64,
    )
    data = DataBlend(config, "demonstrations", seed=5)
    assert [set(part.column_names) for part in data.parts("train")] == [{"messages"}, {"text"}]
    rows = data.encoded("train", tokenizer)
    texts = [tokenizer.decode(ids) for ids in rows["input_ids"]]
    assert len(texts) == 80
    assert sum("<user>" in text for text in texts) == 60
    assert list(rows) == list(
        DataBlend(config, "demonstrations", seed=5).encoded("train", tokenizer)
    )


def test_prompts_keep_what_one_dataset_alone_has(tmp_path, tokenizer) -> None:
    asked = [{"question": f"{i} + 1?", "answer": str(i + 1)} for i in range(30)]
    write(tmp_path / "qa.jsonl", asked)
    messages = [[{"role": "user", "content": f"greet {i}"}] for i in range(30)]
    write(tmp_path / "chat.jsonl", [{"prompt": prompt} for prompt in messages])
    mix = [SourceConfig(str(tmp_path / "qa.jsonl")), SourceConfig(str(tmp_path / "chat.jsonl"))]
    rows = DataBlend(DataConfig(mix=mix), "prompts").encoded("train", tokenizer)
    for row in rows:
        assert (row["answer"] is None) == row["prompt"][0]["content"].startswith("greet")
    write(tmp_path / "chat.jsonl", [{"prompt": f"plain {i}"} for i in range(30)])
    with pytest.raises(ValueError, match=r"differ in their column 'prompt'.*Plain texts do not"):
        DataBlend(DataConfig(mix=mix), "prompts").encoded("train", tokenizer)


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ([], "mix is empty"),
        ([SourceConfig("a", weight=1), SourceConfig("b")], "every dataset a weight, or none"),
    ],
)
def test_a_bad_mix_is_refused(mix, message) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(mix=mix)


def test_shares_lie_beside_each_other() -> None:
    assert sum(shares_of([2, 4, 4]), ()) == pytest.approx((0, 0.2, 0.2, 0.6, 0.6, 1))
    assert shares_of([0, 0, 7]) == [(0, 0), (0, 0), (0, 1)]
    assert [end for _, end in shares_of([1, 1, 1])][-1] == 1.0
    with pytest.raises(ValueError, match="0 or more"):
        shares_of([1, -1, 1])


@pytest.mark.parametrize("fractions", [[2, 4, 4], [1, 1, 8]], ids=str)
def test_no_prompt_is_in_two_steps(tmp_path, fractions) -> None:
    """Though it comes several times, in several datasets, in several formats and in any order."""
    pairs = [{"prompt": f"say {i % 400}", "chosen": f"a{i}", "rejected": "b"} for i in range(1000)]
    paths = [write(tmp_path / "a.jsonl", pairs), write(tmp_path / "b.jsonl", pairs[::-1])]
    prompts = []
    for purpose, share in zip(PURPOSES, shares_of(fractions), strict=True):
        sides = [load_rows(path, purpose=purpose, share=share) for path in paths]
        found = [{prompt_text(row) for row in side} for side in sides]
        assert found[0] == found[1]
        prompts.append(found[0])
    everything = {f"say {i}" for i in range(400)}
    heldout = {prompt_text(r) for r in load_rows(paths[0], purpose="prompts", split="test")}
    assert sum(map(len, prompts)) == len(set().union(*prompts)) == len(everything - heldout)
    assert not heldout & set().union(*prompts)
    for found, fraction in zip(prompts, fractions, strict=True):
        expected = fraction / sum(fractions)
        assert len(found) / 400 == pytest.approx(expected, abs=4 * (expected / 400) ** 0.5)


def test_synthetic_prompts_are_divided_too() -> None:
    found = [
        {prompt_text(row) for row in load_rows("synthetic", purpose=p, share=s, max_rows=300)}
        for p, s in zip(PURPOSES, shares_of([2, 4, 4]), strict=True)
    ]
    assert not found[0] & found[1]
    assert not found[1] & found[2]
    assert all(len(prompts) > 250 for prompts in found)


def test_a_step_without_a_share_says_so(tmp_path) -> None:
    name = write(tmp_path / "a.jsonl", [{"prompt": f"say {i}"} for i in range(50)])
    with pytest.raises(ValueError, match=r"data_split leaves no row .* share is 0% of"):
        load_rows(name, purpose="prompts", share=shares_of([0, 0, 1])[0])


@pytest.mark.parametrize("split", ["2,4,4", [2, 4, 4], (2.0, 4.0, 4.0)], ids=str)
def test_data_split_is_a_list_or_deepspeed_chats_text(split) -> None:
    assert RunConfig(data_split=split).fractions == [2, 4, 4]


@pytest.mark.parametrize("split", ["2,4", "a,b,c", [1, 1, -1], "0,0,0", ""], ids=str)
def test_another_data_split_is_refused(split) -> None:
    with pytest.raises(ValueError, match="data_split must be three shares"):
        RunConfig(data_split=split)


def test_data_path_takes_the_place_of_every_name() -> None:
    config = RunConfig(data_path=["a.jsonl", "b.jsonl"])
    section = DataConfig(name="c.jsonl", columns={"prompt": "q"}, max_length=77)
    found = config.data_of(section)
    assert [(s.name, s.columns) for s in found.sources] == [
        ("a.jsonl", {"prompt": "q"}),
        ("b.jsonl", {"prompt": "q"}),
    ]
    assert found.max_length == 77
    assert RunConfig().data_of(section) is section


def test_deepspeed_chats_local_files(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no data/train.json and no data/eval.json"):
        load_rows("local/jsonfile", purpose="preferences")
    (tmp_path / "data").mkdir()
    pairs = [{"prompt": f"Human: {i} Assistant:", "chosen": " a", "rejected": " b"}
             for i in range(9)]  # fmt: skip
    (tmp_path / "data" / "train.json").write_text(json.dumps(pairs[:6]))
    (tmp_path / "data" / "eval.json").write_text(json.dumps(pairs[6:]))
    assert list(load_rows("local/jsonfile", purpose="preferences")) == pairs[:6]
    assert list(load_rows("local/jsonfile", purpose="preferences", split="test")) == pairs[6:]


def test_margins_of_pairs(tmp_path, tokenizer, caplog) -> None:
    pairs = [
        {"prompt": f"say {i}", "chosen": "a", "rejected": "b", "gap": i / 4} for i in range(40)
    ]
    pairs[7]["gap"] = None
    path = write(tmp_path / "a.jsonl", pairs)
    source = SourceConfig(path, columns={"margin": "gap"})
    with caplog.at_level(logging.WARNING):
        rows = DataBlend(DataConfig(mix=[source]), "preferences").encoded("train", tokenizer)
    for row in rows:
        number = int(tokenizer.decode(row["chosen_ids"]).split("say ")[1].split("a")[0])
        assert row["margin"] == (0.0 if number == 7 else number / 4)
    plain = DataBlend(DataConfig(name=path), "preferences").encoded("train", tokenizer)
    assert set(plain["margin"]) == {0.0}
    write(tmp_path / "a.jsonl", [{**pairs[0], "gap": "much"}, *pairs[1:]])
    with pytest.raises(ValueError, match="margin"):
        DataBlend(DataConfig(mix=[source]), "preferences").encoded("train", tokenizer)
