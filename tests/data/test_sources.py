import json
import logging
import os

import pytest
from datasets import Dataset, DatasetDict

from rlhf.data import load_rows, quality
from rlhf.data.formats import prompt_text
from rlhf.data.split import is_heldout

QA = [{"question": f"what is {i} + {i}?", "answer": f"it is {2 * i}."} for i in range(200)]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(rows):
    return [row["prompt"][0]["content"] for row in rows]


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet", "arrow"])
def test_local_files(tmp_path, suffix):
    name = str(tmp_path / f"rows.{suffix}")
    if suffix == "jsonl":
        write_jsonl(tmp_path / "rows.jsonl", QA)
    elif suffix == "json":
        (tmp_path / "rows.json").write_text(json.dumps(QA))
    elif suffix == "parquet":
        Dataset.from_list(QA).to_parquet(name)
    else:
        Dataset.from_list(QA).save_to_disk(tmp_path / "saved")
        os.rename(next((tmp_path / "saved").glob("*.arrow")), name)
    train = load_rows(name, purpose="demonstrations")
    test = load_rows(name, purpose="demonstrations", split="test")
    assert sorted(questions(train) + questions(test)) == sorted(q["question"] for q in QA)
    assert 0 < len(test) < 40
    assert all(is_heldout(question, 0.05) for question in questions(test))
    answers = {q["question"]: q["answer"] for q in QA}
    for row in train:
        asked = row["prompt"][0]["content"]
        assert row["completion"] == [{"role": "assistant", "content": answers[asked]}]


def test_heldout_side_is_the_same_for_every_purpose_and_order(tmp_path):
    a = write_jsonl(tmp_path / "a.jsonl", QA)
    b = write_jsonl(tmp_path / "b.jsonl", QA[::-1])
    heldout = set(questions(load_rows(a, purpose="prompts", split="test", heldout_fraction=0.3)))
    again = load_rows(b, purpose="demonstrations", split="test", heldout_fraction=0.3)
    assert set(questions(again)) == heldout
    assert 30 < len(heldout) < 90


def test_folder_with_its_own_test_split(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", QA[:150])
    write_jsonl(tmp_path / "test.jsonl", QA[150:])
    assert len(load_rows(str(tmp_path), purpose="prompts")) == 150
    test = load_rows(str(tmp_path), purpose="prompts", split="test")
    assert questions(test) == [q["question"] for q in QA[150:]]


def test_saved_datasets_and_named_splits(tmp_path):
    rows = Dataset.from_list(QA)
    DatasetDict(
        {"train_sft": rows.select(range(50)), "train_rl": rows, "test_rl": rows.select(range(9))}
    ).save_to_disk(str(tmp_path / "many"))
    name = str(tmp_path / "many")
    with pytest.raises(ValueError, match="has the splits test_rl, train_rl, train_sft: say which"):
        load_rows(name, purpose="prompts")
    splits = {"train": "train_rl", "test": "test_rl"}
    assert len(load_rows(name, purpose="prompts", splits=splits)) == 200
    assert len(load_rows(name, purpose="prompts", splits=splits, split="test")) == 9
    with pytest.raises(ValueError, match="has no split dev; it has test_rl"):
        load_rows(name, purpose="prompts", splits={"train": "dev"})


def test_a_lone_test_file_is_divided(tmp_path):
    write_jsonl(tmp_path / "test.jsonl", QA)
    train = load_rows(str(tmp_path), purpose="prompts")
    test = load_rows(str(tmp_path), purpose="prompts", split="test")
    assert not set(questions(train)) & set(questions(test))
    assert len(train) + len(test) == 200


def test_prompts_keep_the_columns_that_rewards_need(tmp_path):
    rows = [{**row, "level": i} for i, row in enumerate(QA)]
    loaded = load_rows(write_jsonl(tmp_path / "a.jsonl", rows), purpose="prompts")
    assert set(loaded.column_names) == {"prompt", "answer", "level"}
    assert loaded[0]["answer"] == QA[loaded[0]["level"]]["answer"]
    demonstrations = load_rows(str(tmp_path / "a.jsonl"), purpose="demonstrations")
    assert set(demonstrations.column_names) == {"prompt", "completion"}


def test_column_mapping(tmp_path):
    rows = [
        {"instruction": f"say {i}", "output": str(i), "prompt": "unused", "x": 1} for i in range(99)
    ]
    name = write_jsonl(tmp_path / "a.jsonl", rows)
    columns = {"prompt": "instruction", "completion": "output"}
    loaded = load_rows(name, purpose="demonstrations", columns=columns)
    assert loaded[0] == {"prompt": "say 0", "completion": "0"}
    with pytest.raises(ValueError, match="has no column input, which the column mapping names"):
        load_rows(name, purpose="demonstrations", columns={"prompt": "input"})


def test_dropped_rows_are_counted_and_said_once(tmp_path, caplog):
    rows = [{"prompt": f"say {i}", "completion": "" if i < 1200 else "x"} for i in range(1300)]
    name = write_jsonl(tmp_path / "a.jsonl", rows)
    with caplog.at_level(logging.WARNING, logger="rlhf"):
        loaded = load_rows(name, purpose="demonstrations", heldout_fraction=0.01)
    assert 90 <= len(loaded) <= 100
    assert [record.getMessage() for record in caplog.records] == [
        f"{name}: dropped 1200 of 1300 rows with an empty prompt or completion, or two equal ones"
    ]


def test_max_rows(tmp_path):
    name = write_jsonl(tmp_path / "a.jsonl", QA)
    assert len(load_rows(name, purpose="prompts", max_rows=7)) == 7
    assert len(load_rows(name, purpose="prompts", max_rows=10_000)) < 200
    with pytest.raises(ValueError, match="max_rows must be at least 1, got 0"):
        load_rows(name, purpose="prompts", max_rows=0)


def test_a_rewritten_file_is_read_anew(tmp_path):
    name = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "old", "completion": "old"}] * 3)
    kept = {"purpose": "demonstrations", "heldout_fraction": 1e-9}
    assert load_rows(name, **kept)["completion"][0] == "old"
    write_jsonl(tmp_path / "a.jsonl", [{"prompt": "new", "completion": "new"}] * 3)
    assert load_rows(name, **kept)["completion"][0] == "new"


def test_synthetic_rows_by_purpose():
    demonstrations = load_rows("synthetic", purpose="demonstrations", max_rows=50)
    assert set(demonstrations.column_names) == {"prompt", "completion"}
    pairs = load_rows("synthetic", purpose="preferences", split="test")
    assert set(pairs.column_names) == {"prompt", "chosen", "rejected"}
    chosen = quality(pairs["prompt"], pairs["chosen"])
    rejected = quality(pairs["prompt"], pairs["rejected"])
    assert all(a > b for a, b in zip(chosen, rejected, strict=True))
    prompts = load_rows("synthetic", purpose="prompts", max_rows=50, seed=1)
    assert prompts.column_names == ["prompt"]
    assert prompts["prompt"] != load_rows("synthetic", purpose="prompts", max_rows=50)["prompt"]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ("", {}, "has no rows: the file is empty"),
        ("[]", {}, "has no rows|cannot load"),
        ('{"prompt": "a"', {}, "cannot load .*bad.json.*; tried this file: .*JSON"),
        ('{"input": "a"}', {}, "columns input: it needs one of .*prompt, chosen, rejected"),
        ('{"prompt": " "}', {}, "nothing to learn from: in all its 1 rows"),
        (
            '{"prompt": "a"}',
            {"split": "test"},
            "1 rows with 1 different prompts are too few",
        ),
        ('{"prompt": "a"}', {"split": "dev"}, "unknown split 'dev'"),
        ('{"prompt": "a"}', {"purpose": "play"}, "unknown purpose 'play'"),
        ('{"prompt": "a"}', {"heldout_fraction": 1.5}, "between 0 and 1, got 1.5"),
    ],
    ids=["empty", "no-rows", "json", "column", "blank", "few", "split", "purpose", "fraction"],
)
def test_bad_files_say_what_is_wrong(tmp_path, content, options, message):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_rows(str(tmp_path / "bad.json"), **{"purpose": "prompts", **options})


def test_a_bad_row_is_numbered(tmp_path):
    """Also when its fellows have been converted already."""
    path = tmp_path / "rows.jsonl"
    lines = [{"messages": [{"role": "user", "content": "a"}]}] * 1200
    lines[1100] = {"messages": [{"role": None, "content": "a"}]}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"rows\.jsonl', row 1101: expected a list of messages"):
        load_rows(str(path), purpose="prompts")


def test_another_encoding_than_utf8(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"prompt": "caf\u00e9"}\n'.encode("latin-1") * 9)
    with pytest.raises(ValueError, match=r"rows\.jsonl' is not UTF-8 text .*iconv"):
        load_rows(str(path), purpose="prompts")


def test_unknown_type_and_empty_folder(tmp_path):
    (tmp_path / "rows.xyz").write_text("a")
    with pytest.raises(ValueError, match=r"known file types are \.json, \.jsonl"):
        load_rows(str(tmp_path / "rows.xyz"), purpose="prompts")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="tried the data files of this folder"):
        load_rows(str(tmp_path / "nothing"), purpose="prompts")


@pytest.mark.parametrize("name", ["missing.jsonl", "./missing", "/no/such/folder", "~/missing/x"])
def test_missing_files(name):
    with pytest.raises(FileNotFoundError, match="no such file or folder") as error:
        load_rows(name, purpose="prompts")
    assert name in str(error.value)


def test_unreachable_hub_is_one_clear_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="tried the Hugging Face hub and its local cache") as error:
        load_rows("no-such-organisation/no-such-dataset", purpose="prompts")
    assert "no local file or folder of this name" in str(error.value)


def test_real_folders(real_data):
    hh = str(real_data / "hh_rlhf")
    train = load_rows(hh, purpose="preferences")
    assert 395 <= len(train) <= 400
    assert 95 <= len(load_rows(hh, purpose="preferences", split="test")) <= 100
    assert len(load_rows(hh, purpose="demonstrations")) == len(train)
    gsm8k = load_rows(str(real_data / "gsm8k"), purpose="prompts", split="test")
    assert len(gsm8k) == 200
    assert "####" in gsm8k[0]["answer"]
    with pytest.raises(ValueError, match="no preferences in a dataset with the columns answer"):
        load_rows(str(real_data / "gsm8k"), purpose="preferences")


def test_hh_file_held_out_by_prompt(real_data):
    name = str(real_data / "hh_rlhf" / "train.jsonl")
    sides = [load_rows(name, purpose="preferences", split=side) for side in ("train", "test")]
    keys = [{prompt_text(row) for row in side} for side in sides]
    assert not keys[0] & keys[1]
