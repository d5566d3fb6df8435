import json

import pytest

from rlhf.data import (
    detect_format,
    parse_dialogue,
    texts_of,
    to_completion,
    to_demonstration,
    to_preference,
    to_prompt,
)
from rlhf.data.formats import prompt_text


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "be brief"}
HH_CHOSEN = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: who?\n\nAssistant: me, and you?"
HH_REJECTED = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: who?\n\nAssistant: me, no."
HH_PROMPT = [user("hi"), assistant("hello"), user("who?")]


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["text"], "text"),
        (["messages", "source"], "messages"),
        (["prompt", "completion"], "prompt_completion"),
        (["prompt"], "prompt"),
        (["prompt", "chosen", "rejected"], "preference"),
        (["chosen", "rejected", "score"], "implicit_preference"),
        (["question", "answer"], "question_answer"),
        (["text", "messages"], "messages"),
    ],
)
def test_detect_format(columns, expected):
    assert detect_format(columns) == expected


def test_detect_format_names_what_it_found_and_what_it_takes():
    with pytest.raises(ValueError, match="columns input, output") as error:
        detect_format(["output", "input"], purpose="preferences")
    assert "{prompt, chosen, rejected}; {chosen, rejected}" in str(error.value)
    assert 'columns={"prompt": "instruction"}' in str(error.value)
    assert "{text}" not in str(error.value)
    with pytest.raises(ValueError, match=r"\{text\}"):
        detect_format(["output"])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "once"}, {"text": "once"}),
        (
            {"prompt": "a b", "completion": " c"},
            {"prompt": "a b", "completion": " c"},
        ),
        (
            {"prompt": "a", "completion": [assistant("b")]},
            {"prompt": [user("a")], "completion": [assistant("b")]},
        ),
        (
            {"question": "2+2?", "answer": 4},
            {"prompt": [user("2+2?")], "completion": [assistant("4")]},
        ),
        (
            {"messages": [SYSTEM, user("a"), assistant("b"), user("bye")]},
            {"messages": [SYSTEM, user("a"), assistant("b")]},
        ),
        (
            {"messages": [{**user("a"), "name": "x"}, assistant("b")]},
            {"messages": [user("a"), assistant("b")]},
        ),
        (
            {"chosen": HH_CHOSEN, "rejected": HH_REJECTED},
            {"prompt": HH_PROMPT, "completion": [assistant("me, and you?")]},
        ),
    ],
    ids=["text", "strings", "mixed", "question", "messages", "extra-key", "hh"],
)
def test_to_demonstration(row, expected):
    assert to_demonstration(row) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"prompt": "a", "chosen": " b", "rejected": " c"},
            {"prompt": "a", "chosen": " b", "rejected": " c"},
        ),
        (
            {"chosen": "the cat sat.", "rejected": "the cab sat."},
            {"prompt": "the", "chosen": " cat sat.", "rejected": " cab sat."},
        ),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
            {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
        ),
        (  # the prompt is repeated in the dialogues
            {
                "prompt": "a",
                "chosen": [user("a"), assistant("b")],
                "rejected": [user("a"), assistant("c")],
            },
            {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
        ),
        (
            {"prompt": [SYSTEM, user("a")], "chosen": "b", "rejected": "c"},
            {
                "prompt": [SYSTEM, user("a")],
                "chosen": [assistant("b")],
                "rejected": [assistant("c")],
            },
        ),
        (
            {"chosen": HH_CHOSEN, "rejected": HH_REJECTED},
            {
                "prompt": HH_PROMPT,
                "chosen": [assistant("me, and you?")],
                "rejected": [assistant("me, no.")],
            },
        ),
        (  # the dialogues part at a human turn: the completions begin with the assistant before it
            {
                "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
                "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: e\n\nAssistant: f",
            },
            {
                "prompt": [user("a")],
                "chosen": [assistant("b"), user("c"), assistant("d")],
                "rejected": [assistant("b"), user("e"), assistant("f")],
            },
        ),
    ],
    ids=["strings", "prefix", "messages", "repeated", "mixed", "hh", "hh-parts-early"],
)
def test_to_preference(row, expected):
    assert to_preference(row) == expected


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "chosen": " b", "rejected": " b"},
        {"prompt": "a", "chosen": "", "rejected": " b"},
        {"prompt": "a", "chosen": "b", "rejected": None},
        {"chosen": "cat", "rejected": "dog"},
        {"chosen": HH_CHOSEN, "rejected": HH_CHOSEN},
        {"chosen": HH_CHOSEN, "rejected": "\n\nHuman: hi\n\nAssistant: "},
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant(" ")]},
    ],
    ids=["equal", "empty", "none", "no-prefix", "hh-equal", "hh-empty", "messages-empty"],
)
def test_a_pair_that_teaches_nothing_is_none(row):
    assert to_preference(row) is None


@pytest.mark.parametrize(
    "row",
    [
        {"text": " \n"},
        {"prompt": "a", "completion": ""},
        {"prompt": "a", "completion": None},
        {"messages": [user("a")]},
        {"messages": [user("a"), assistant("b"), user("c"), assistant("")]},
        {"question": "a", "answer": " "},
    ],
    ids=["text", "completion", "none", "messages", "messages-empty", "answer"],
)
def test_a_demonstration_of_nothing_is_none(row):
    assert to_demonstration(row) is None


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a b"}, "a b"),
        ({"prompt": [user("a"), assistant("b")]}, [user("a")]),
        ({"messages": [SYSTEM, user("a"), assistant("b")]}, [SYSTEM, user("a")]),
        ({"question": "2+2?", "answer": "4"}, [user("2+2?")]),
        ({"prompt": "a", "completion": "b"}, "a"),
        ({"chosen": HH_CHOSEN, "rejected": HH_REJECTED}, HH_PROMPT),
        ({"prompt": ""}, None),
        ({"messages": [SYSTEM]}, None),
    ],
)
def test_to_prompt(row, expected):
    assert to_prompt(row) == (None if expected is None else {"prompt": expected})


@pytest.mark.parametrize(
    "raw",
    ["hello", [{"from": "human", "value": "hi"}], [{"role": "user", "content": [{"type": "x"}]}]],
    ids=["string", "sharegpt", "parts"],
)
def test_malformed_messages_are_shown(raw):
    with pytest.raises(ValueError, match="expected a list of messages") as error:
        to_demonstration({"messages": raw})
    assert repr(raw)[:30] in str(error.value)


def test_mixed_pair_is_refused():
    with pytest.raises(ValueError, match="both be strings or both be message lists"):
        to_preference({"chosen": "a", "rejected": [assistant("b")]})


def test_parse_dialogue():
    assert parse_dialogue("\n\nHuman: a: b\n\nc\n\nAssistant:  d ") == [
        user("a: b\n\nc"),
        assistant("d"),
    ]
    assert parse_dialogue("Assistant: d") is None
    assert parse_dialogue("the Human: and the Assistant: of a play") is None


def test_to_completion_has_the_form_of_its_prompt():
    assert to_completion(" yes", "a") == " yes"
    assert to_completion(" yes", [user("a")]) == [assistant("yes")]


def test_texts_of():
    rows = [
        {"prompt": [user("a")], "chosen": [assistant("b")], "rejected": [assistant("c")]},
        {"text": "d"},
        {"prompt": "e", "completion": "f"},
    ]
    assert [text for text in texts_of(rows) if text] == ["a", "b", "c", "d", "e", "f"]


def test_a_prompt_has_one_identity_for_every_purpose():
    row = {"chosen": HH_CHOSEN, "rejected": HH_REJECTED}
    keys = {prompt_text(convert(row)) for convert in (to_demonstration, to_preference, to_prompt)}
    assert len(keys) == 1
    messages = {"messages": [*HH_PROMPT, assistant("me, and you?")]}
    assert keys == {prompt_text(to_demonstration(messages)), prompt_text(to_prompt(messages))}


@pytest.mark.parametrize("name", ["train", "test"])
def test_real_hh_rows(real_data, name):
    lines = (real_data / "hh_rlhf" / f"{name}.jsonl").read_text().splitlines()
    pairs = [(row, to_preference(row)) for row in map(json.loads, lines)]
    dropped = [row for row, pair in pairs if pair is None]
    assert len(dropped) <= 3
    for row in dropped:
        assert any(row[side].rstrip().endswith("Assistant:") for side in ("chosen", "rejected"))
    for row, pair in pairs:
        if pair is None:
            continue
        assert pair["prompt"][-1]["role"] == "user"
        for side in ("chosen", "rejected"):
            assert pair[side][0]["role"] == pair[side][-1]["role"] == "assistant"
            said = "".join(row[side].split())  # every character is kept but for the white space
            names = {"user": "Human:", "assistant": "Assistant:"}
            turns = [*pair["prompt"], *pair[side]]
            rebuilt = "".join(names[turn["role"]] + turn["content"] for turn in turns)
            assert "".join(rebuilt.split()) == said


def test_real_gsm8k_rows(real_data):
    lines = (real_data / "gsm8k" / "test.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        demonstration = to_demonstration(row)
        assert demonstration["prompt"] == [user(row["question"])]
        assert "#### " in demonstration["completion"][0]["content"]
