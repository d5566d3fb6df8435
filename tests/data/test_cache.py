"""What was prepared once is read from disk, and never when anything about it has changed."""

import json
import logging
import os

import datasets
import pytest
from datasets import Dataset

from rlhf.data import (
    cache,
    encode_demonstrations,
    encode_preferences,
    encode_prompts,
    encoding,
    load_rows,
    train_tokenizer,
)

TEXTS = ["the cat sat on the mat", "and the dog sat on the log"]


@pytest.fixture
def prepared(monkeypatch):
    """How many sequences were really tokenised."""
    counts = {"sequences": 0}
    encode_pieces = encoding._encode_pieces

    def counting(sequences, tokenizer):
        counts["sequences"] += len(sequences)
        return encode_pieces(sequences, tokenizer)

    monkeypatch.setattr(encoding, "_encode_pieces", counting)
    return counts


def rows(*answers: str) -> Dataset:
    asked = [{"role": "user", "content": "why?"}]
    said = [[{"role": "assistant", "content": answer}] for answer in answers]
    return Dataset.from_list([{"prompt": asked, "completion": answer} for answer in said])


def small_tokenizer(**options):
    return train_tokenizer(TEXTS, **{"vocab_size": 280, **options})


def ids(found: Dataset) -> list[list[int]]:
    return list(found["input_ids"])


def test_the_second_time_it_comes_from_disk(prepared) -> None:
    first = encode_demonstrations(rows("a", "b"), small_tokenizer(), max_length=50)
    assert prepared["sequences"] == 2
    again = encode_demonstrations(rows("a", "b"), small_tokenizer(), max_length=50)
    assert prepared["sequences"] == 2
    assert list(again) == list(first)
    assert again.cache_files  # memory-mapped


def changed_eos():
    tokenizer = small_tokenizer()
    tokenizer.eos_token = "<user>"
    return tokenizer


def changed_template():
    tokenizer = small_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("'> '", "'>  '")
    return tokenizer


CHANGES = {
    "content": (lambda: rows("a", "c"), small_tokenizer, 50),
    "order": (lambda: rows("b", "a"), small_tokenizer, 50),
    "vocabulary": (lambda: rows("a", "b"), lambda: small_tokenizer(vocab_size=275), 50),
    "eos": (lambda: rows("a", "b"), changed_eos, 50),
    "template": (lambda: rows("a", "b"), changed_template, 50),
    "limit": (lambda: rows("a", "b"), small_tokenizer, 49),
}


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_changes_is_prepared_anew(prepared, name: str) -> None:
    encode_demonstrations(rows("a", "b"), small_tokenizer(), max_length=50)
    make_rows, make_tokenizer, limit = CHANGES[name]
    found = encode_demonstrations(make_rows(), make_tokenizer(), max_length=limit)
    assert prepared["sequences"] == 4
    one_by_one = [
        encoding.encode_demonstration(row, make_tokenizer(), max_length=limit)
        for row in make_rows()
    ]
    assert list(found) == one_by_one


def test_a_template_that_writes_the_time_is_not_stale(prepared, monkeypatch) -> None:
    """Some published templates write today's date into the prompt."""
    tokenizer = small_tokenizer(chat_template="{{ strftime_now('%d') }} " + "{{ messages|length }}")
    today = iter(["1", "1", "2", "2"])
    monkeypatch.setattr(cache, "_rendered", lambda tokenizer: next(today))
    for expected in (1, 1, 2, 2):
        encode_prompts(rows("a").select_columns("prompt"), tokenizer, max_length=50)
        assert prepared["sequences"] == expected


def test_purposes_do_not_share_a_name(prepared) -> None:
    pairs = Dataset.from_list([{"prompt": "x", "chosen": "the cat", "rejected": "the dog"}])
    encode_preferences(pairs, small_tokenizer(), max_length=50)
    assert encode_prompts(pairs, small_tokenizer(), max_length=50).column_names[-1] == "input_ids"


def test_new_code_prepares_anew(prepared, monkeypatch) -> None:
    encode_demonstrations(rows("a"), small_tokenizer(), max_length=50)
    monkeypatch.setattr(cache, "_code_digest", lambda: "another version")
    encode_demonstrations(rows("a"), small_tokenizer(), max_length=50)
    assert prepared["sequences"] == 2


def test_warnings_are_repeated_from_the_cache(caplog) -> None:
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="rlhf"):
            encode_demonstrations(rows("a", "the cat " * 40), small_tokenizer(), max_length=20)
        assert ["1 cut at the right" in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_an_edited_file_with_its_old_time_is_read_anew(tmp_path, folder: bool) -> None:
    """As a copy that keeps times leaves it; same size, too."""
    file = tmp_path / "data" / "train.jsonl"
    file.parent.mkdir()
    name = str(file.parent if folder else file)
    for word in ("old", "new"):
        lines = [json.dumps({"prompt": f"say {i}", "completion": word}) for i in range(30)]
        file.write_text("\n".join(lines))
        os.utime(file, (1_000_000_000, 1_000_000_000))
        found = load_rows(name, purpose="demonstrations", heldout_fraction=0.1)
        assert set(found["completion"]) == {word}


def test_a_preparation_that_was_stopped_leaves_nothing_to_read(prepared, monkeypatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(Dataset, "save_to_disk", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            encode_demonstrations(rows("a"), small_tokenizer(), max_length=50)
    found = encode_demonstrations(rows("a"), small_tokenizer(), max_length=50)
    assert len(found) == 1
    assert prepared["sequences"] == 2


def test_an_error_is_not_kept(prepared) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="over the limit of 2 tokens"):
            encode_demonstrations(rows("a"), small_tokenizer(), max_length=2)
    folder = datasets.config.HF_DATASETS_CACHE / "rlhf"
    assert [path for path in folder.glob("encoded*") if path.is_dir()] == []
