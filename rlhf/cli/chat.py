"""A conversation with a model in the terminal, token by token."""

from __future__ import annotations

from pathlib import Path

import torch

from hybrid_engine import HybridEngine, SamplingParams
from rlhf.data import decode_completion, encode_prompt, load_tokenizer
from rlhf.models import load_causal_lm

REPLACEMENT = "\ufffd"  # what half of a multi-byte character decodes to


class Conversation:
    """A model with the messages so far."""

    def __init__(self, folder: str) -> None:
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"no such folder: {folder}. Give one that `rlhf` has written")
        self._tokenizer = load_tokenizer(folder)
        model = load_causal_lm(folder, self._tokenizer, dtype=torch.float32).eval()
        self._engine = HybridEngine(model)
        self._messages: list[dict[str, str]] = []

    def say(self, text: str, params: SamplingParams) -> None:
        """Send a message and print the answer as it is sampled."""
        self._messages.append({"role": "user", "content": text})
        room = self._engine.max_positions - params.max_new_tokens
        if room < 1:
            raise ValueError(
                f"max_new_tokens={params.max_new_tokens} must be below the model's "
                f"{self._engine.max_positions} positions, which hold the conversation too"
            )
        prompt = self._encoded(room)
        if prompt is None:
            self._messages.pop()
            raise ValueError(
                f"the message is longer than {room} tokens, which is what the model has "
                f"positions for beside max_new_tokens={params.max_new_tokens}"
            )
        tokens: list[int] = []
        printed = ""
        for token in self._engine.stream(prompt, params):
            tokens.append(token)
            answer = decode_completion(tokens, self._tokenizer).lstrip()
            if not answer.endswith(REPLACEMENT):
                print(answer[len(printed) :], end="", flush=True)
                printed = answer
        print()
        self._messages.append({"role": "assistant", "content": printed})

    def _encoded(self, room: int) -> list[int] | None:
        """The conversation's ids, without the oldest exchanges where there is no room for them.

        None if the last message alone is too long.
        """
        for start in range(0, len(self._messages), 2):
            kept = self._messages[start:]
            ids = encode_prompt({"prompt": kept}, self._tokenizer, max_length=room)
            if ids is not None:
                if start:
                    print(f"[without the first {start} messages, for which there is no room]")
                self._messages = kept
                return ids
        return None


def chat(
    folder: str, *, prompt: str | None, max_new_tokens: int, temperature: float, seed: int
) -> None:
    """Answer one prompt, or converse until end of input."""
    params = SamplingParams(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    conversation = Conversation(folder)
    if prompt is not None:
        conversation.say(prompt, params)
        return
    print("Ctrl-D ends the conversation.")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        if text:
            conversation.say(text, params)
