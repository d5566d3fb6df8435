"""Recognise the formats that datasets come in, and bring their rows into one canonical form.

    columns found                          canonical demonstration     preference   prompt
    text                                   {text}, verbatim            -            -
    messages                               {messages}                  -            yes
    prompt, completion                     {prompt, completion}        -            yes
    prompt, chosen, rejected               chosen is the completion    yes          yes
    chosen, rejected (implicit prompt)     chosen is the completion    yes          yes
    question, answer                       as prompt, completion       -            yes
    prompt                                 -                           -            yes

A canonical preference is {prompt, chosen, rejected}, and margin if the row has one; a canonical
prompt is {prompt}. Dialogues are
lists of {"role", "content"} messages; prompts and completions that are plain strings stay verbatim
strings. Dialogues written as text in the manner of hh-rlhf ("\\n\\nHuman:", "\\n\\nAssistant:")
without a prompt column are parsed into messages.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypedDict, cast

Row = dict[str, Any]
Purpose = Literal["demonstrations", "preferences", "prompts"]


class Message(TypedDict):
    """One turn of a dialogue."""

    role: str  # system, user or assistant
    content: str


Dialogue = str | list[Message]

# Recognised in this order: the first whose columns are all there.
FORMATS: Mapping[str, tuple[str, ...]] = {
    "preference": ("prompt", "chosen", "rejected"),
    "implicit_preference": ("chosen", "rejected"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
    "question_answer": ("question", "answer"),
    "prompt": ("prompt",),
    "text": ("text",),
}
_PAIRS = ("preference", "implicit_preference")
_SERVES: Mapping[Purpose, tuple[str, ...]] = {
    "demonstrations": (
        *_PAIRS,
        "prompt_completion",
        "messages",
        "question_answer",
        "text",
    ),
    "preferences": _PAIRS,
    "prompts": (
        *_PAIRS,
        "prompt_completion",
        "messages",
        "question_answer",
        "prompt",
    ),
}
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def detect_format(column_names: Collection[str], *, purpose: Purpose | None = None) -> str:
    """Return the name of the first format in FORMATS that the columns have.

    With a `purpose`, only the formats that can serve it are looked for. Raises ValueError naming
    the columns found, the formats accepted and the mapping option.
    """
    accepted = tuple(FORMATS) if purpose is None else _SERVES[purpose]
    for name in accepted:
        if set(FORMATS[name]) <= set(column_names):
            return name
    raise ValueError(
        f"no {purpose or 'known format'} in a dataset with the columns"
        f" {', '.join(sorted(column_names)) or '(none)'}: it needs one of "
        + "; ".join("{" + ", ".join(FORMATS[name]) + "}" for name in accepted)
        + '. Name columns that are called otherwise with columns={"prompt": "instruction"}'
    )


def to_demonstration(row: Row) -> Row | None:
    """Return {text}, {messages} or {prompt, completion}; None if there is nothing to learn."""
    form = detect_format(row, purpose="demonstrations")
    row = _cleaned(row, form)
    if form == "text":
        return {"text": row["text"]} if _said_something(row["text"]) else None
    if form == "messages":
        messages = _until_last_reply(_messages(row["messages"]))
        return {"messages": messages} if _said_something(messages) else None
    if form in _PAIRS:
        pair = _split_pair(row)
        prompt, completion = (pair["prompt"], pair["chosen"]) if pair else ("", "")
    elif form == "question_answer":
        prompt, completion = _said("user", row["question"]), _said("assistant", row["answer"])
    else:
        prompt, completion = _align(row["prompt"], row["completion"])
    return {"prompt": prompt, "completion": completion} if _said_something(completion) else None


def to_preference(row: Row) -> Row | None:
    """Return {prompt, chosen, rejected}, and margin if the row has that column.

    None if a completion is empty or both are the same.
    """
    pair = _split_pair(_cleaned(row, detect_format(row, purpose="preferences")))
    if pair is None or pair["chosen"] == pair["rejected"]:
        return None
    if not _said_something(pair["chosen"], pair["rejected"]):
        return None
    return {**pair, "margin": _number(row["margin"])} if "margin" in row else pair


def to_prompt(row: Row) -> Row | None:
    """Return {prompt}; None if it is empty."""
    form = detect_format(row, purpose="prompts")
    row = _cleaned(row, form)
    prompt: Dialogue
    if form in _PAIRS:
        pair = _split_pair(row)
        prompt = pair["prompt"] if pair else ""
    elif form == "question_answer":
        prompt = _said("user", row["question"])
    else:
        asked = row["messages" if form == "messages" else "prompt"]
        prompt = asked if isinstance(asked, str) else _asked(_messages(asked))
    return {"prompt": prompt} if _said_something(prompt) else None


def parse_dialogue(text: str) -> list[Message] | None:
    """Parse "\\n\\nHuman: ...\\n\\nAssistant: ..." into messages; None for any other text."""
    _, *turns = _TURN.split(text.strip())
    if not turns or not text.lstrip().startswith("Human:"):
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": content.strip()}
        for speaker, content in zip(turns[::2], turns[1::2], strict=True)
    ]


def last_content(dialogue: str | Sequence[Message]) -> str:
    """Return the text itself, or the content of the last message."""
    if isinstance(dialogue, str):
        return dialogue
    return dialogue[-1]["content"] if dialogue else ""


def to_completion(text: str, prompt: str | Sequence[Message]) -> Dialogue:
    """Return a generated response in the form of its prompt: a string, or one assistant message."""
    return text if isinstance(prompt, str) else _said("assistant", text.strip())


def prompt_text(row: Row) -> str:
    """Return the text that identifies a canonical row's prompt, for hashing."""
    if "text" in row:
        return cast(str, row["text"])
    if "messages" in row:
        dialogue: Dialogue = _asked(row["messages"])
    else:
        dialogue = row["prompt"]
    if isinstance(dialogue, str):
        return dialogue
    if len(dialogue) == 1:
        return dialogue[0]["content"]
    return "\n\n".join(f"{m['role']}: {m['content']}" for m in dialogue)


def texts_of(rows: Iterable[Row]) -> Iterator[str]:
    """Yield every text in canonical rows, message by message: what a tokenizer is trained on."""
    for row in rows:
        for column in ("text", "messages", "prompt", "completion", "chosen", "rejected"):
            dialogue: Dialogue = row.get(column) or ""
            if isinstance(dialogue, str):
                yield dialogue
            else:
                yield from (message["content"] for message in dialogue)


def _split_pair(row: Row) -> Row | None:
    """Separate the prompt from the two completions."""
    chosen, rejected = row["chosen"], row["rejected"]
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("chosen and rejected must both be strings or both be message lists")
    if row.get("prompt"):
        prompt, chosen_completion = _align(row["prompt"], chosen)
        _, rejected_completion = _align(row["prompt"], rejected)
        return {"prompt": prompt, "chosen": chosen_completion, "rejected": rejected_completion}
    if not isinstance(chosen, str):
        return _split_dialogues(_messages(chosen), _messages(rejected))
    dialogues = parse_dialogue(chosen), parse_dialogue(rejected)
    if dialogues[0] is not None and dialogues[1] is not None:
        return _split_dialogues(dialogues[0], dialogues[1])
    return _split_texts(chosen, rejected)


def _split_texts(chosen: str, rejected: str) -> Row | None:
    """Take the longest common prefix that ends before a space, which goes to the completions."""
    pairs = enumerate(zip(chosen, rejected, strict=False))
    end = next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    prompt = re.sub(r"\S+$", "", chosen[:end]).rstrip()
    if not prompt:
        return None
    return {"prompt": prompt, "chosen": chosen[len(prompt) :], "rejected": rejected[len(prompt) :]}


def _split_dialogues(chosen: list[Message], rejected: list[Message]) -> Row | None:
    """Take the longest common prefix after which both go on with an assistant turn."""
    chosen, rejected = _until_last_reply(chosen), _until_last_reply(rejected)
    end, split = min(len(chosen), len(rejected)), 0
    for i in range(end):
        if i and chosen[i]["role"] == rejected[i]["role"] == "assistant":
            split = i
        if chosen[i] != rejected[i]:
            break
    if not split:
        return None
    return {"prompt": chosen[:split], "chosen": chosen[split:], "rejected": rejected[split:]}


def _align(prompt: Any, completion: Any) -> tuple[Dialogue, Dialogue]:
    """Bring a prompt and its completion into one form: both strings or both message lists."""
    if isinstance(prompt, str) and isinstance(completion, str):
        return prompt, completion
    asked = _said("user", prompt) if isinstance(prompt, str) else _messages(prompt)
    if isinstance(completion, str):
        return asked, _said("assistant", completion)
    answered = _messages(completion)
    start = len(asked) if answered[: len(asked)] == asked else 0  # some sets repeat the prompt
    return asked, _until_last_reply(answered[start:])


def _said_something(*dialogues: Dialogue) -> bool:
    return all(last_content(dialogue).strip() for dialogue in dialogues)


def _number(margin: Any) -> float:
    """A margin; none is 0."""
    if margin is not None and (not isinstance(margin, int | float) or not math.isfinite(margin)):
        raise ValueError(f"margin: expected a finite number, got {margin!r}")
    return float(margin or 0.0)


def _said(role: str, content: str) -> list[Message]:
    return [{"role": role, "content": content}]


def _cleaned(row: Row, form: str) -> Row:
    """Return the columns of the format: nothing for None, numbers as text."""
    cells = {column: row[column] for column in FORMATS[form]}
    return {
        column: "" if cell is None else str(cell) if isinstance(cell, int | float) else cell
        for column, cell in cells.items()
    }


def _messages(raw: Any) -> list[Message]:
    """Keep role and content only; raise ValueError for anything that is not a message list."""
    if not isinstance(raw, list) or not all(
        isinstance(message, Mapping)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content") or "", str)
        for message in raw
    ):
        raise ValueError(
            'expected a list of messages {"role": ..., "content": text}, got ' + repr(raw)[:120]
        )
    return [{"role": m["role"], "content": m.get("content") or ""} for m in raw]


def _until_last_reply(messages: list[Message]) -> list[Message]:
    """Drop the turns after the last assistant turn."""
    end = max((i + 1 for i, m in enumerate(messages) if m["role"] == "assistant"), default=0)
    return messages[:end]


def _asked(messages: list[Message]) -> list[Message]:
    """Return the dialogue up to and with its last user turn."""
    end = max((i + 1 for i, m in enumerate(messages) if m["role"] == "user"), default=0)
    return messages[:end]
