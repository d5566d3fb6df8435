"""Canonical rows as text: pieces that the model reads and pieces that it has to say, in turn."""

from __future__ import annotations

from typing import NamedTuple, cast

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rlhf.data.formats import Dialogue, Message, Row


class Piece(NamedTuple):
    """A stretch of text that is tokenised on its own."""

    text: str
    reply: bool  # said by the model: its ids end with EOS
    trained: bool


def demonstration_pieces(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Render {text}, {messages} or {prompt, completion}."""
    if "text" in row:
        return [Piece(row["text"], reply=True, trained=True)]
    if "messages" in row:
        return _turns(row["messages"], tokenizer)
    return _completed_pieces(row["prompt"], row["completion"], tokenizer)


def preference_pieces(row: Row, tokenizer: PreTrainedTokenizerBase) -> list[list[Piece]]:
    """Render the chosen and the rejected sequence, in this order."""
    return [
        _completed_pieces(row["prompt"], row[side], tokenizer) for side in ("chosen", "rejected")
    ]


def prompt_pieces(prompt: Dialogue, tokenizer: PreTrainedTokenizerBase) -> list[Piece]:
    """Render a prompt up to where the response begins."""
    if isinstance(prompt, str):
        return [Piece(prompt, reply=False, trained=False)]
    return _turns(prompt, tokenizer, open_reply=True)


def _completed_pieces(
    prompt: Dialogue, completion: Dialogue, tokenizer: PreTrainedTokenizerBase
) -> list[Piece]:
    if isinstance(prompt, str) and isinstance(completion, str):
        return [*prompt_pieces(prompt, tokenizer), Piece(completion, reply=True, trained=True)]
    if isinstance(prompt, str) or isinstance(completion, str):
        raise ValueError("prompt and completion must both be strings or both be message lists")
    return _turns([*prompt, *completion], tokenizer, trained_from=len(prompt))


def _turns(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    *,
    trained_from: int = 0,
    open_reply: bool = False,
) -> list[Piece]:
    """Render a dialogue through the chat template: context, reply, context, reply, ...

    A reply is what the template adds to the generation prompt, up to its EOS. Some templates
    rewrite earlier turns (they drop the reasoning, say); those turns then become mere context.
    """
    pieces: list[Piece] = []
    done = ""  # what the pieces so far spell

    def open_turn(before: list[Message]) -> str:
        nonlocal done
        opening = _render(before, tokenizer, add_generation_prompt=True)
        if not opening.startswith(done):
            pieces.clear()
            done = ""
        pieces.append(Piece(opening[len(done) :], reply=False, trained=False))
        return opening

    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opening = open_turn(messages[:i])
        closed = _render(messages[: i + 1], tokenizer, add_generation_prompt=False)
        if closed.startswith(opening):
            reply, end = _before_eos(closed[len(opening) :], str(tokenizer.eos_token))
            done = opening + end
        else:
            reply, done = message["content"], closed
        pieces.append(Piece(reply, reply=True, trained=i >= trained_from))
    if open_reply:
        open_turn(messages)
    return pieces


def _before_eos(text: str, eos: str) -> tuple[str, str]:
    """Return a rendered reply without its EOS and what may follow it, and the same with its EOS."""
    before, found, _ = text.rpartition(eos)
    return (before, before + found) if found else (text.rstrip(), text.rstrip())


def _render(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, *, add_generation_prompt: bool
) -> str:
    try:
        text = tokenizer.apply_chat_template(
            cast(list[dict[str, str]], messages),
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(
            f"the tokenizer's chat template rejects a dialogue with the roles {roles}: {error}"
        ) from error
    return str(text)
