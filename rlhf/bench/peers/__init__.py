"""Who can be measured: each peer is a module with the same three names.

`ABOUT` says what it is, `why_not(subject)` why it cannot run here, or None, and
`generator(subject)` is a context in which requests are answered. Which of them roll out for a PPO
iteration is in `rlhf.bench.step`.
"""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol, cast

from rlhf.bench.subject import Subject

PEERS = {
    "ours": "ours",
    "hf": "hf",
    "hf-compile": "hf_compile",
    "hf-cb": "hf_continuous",
    "hf-ddp": "hf_ddp",
    "deepspeed-he": "deepspeed_hybrid",
    "deepspeed-zero": "deepspeed_zero",
    "trl": "trl_generate",
    "colossal": "coati",
    "ctranslate2": "ctranslate",
    "vllm": "vllm_engine",
}


@dataclass(frozen=True)
class Request:
    """One batch to generate for. Temperature 0 is greedy; else the whole distribution."""

    prompts: list[list[int]]
    new_tokens: int
    temperature: float = 1.0
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Answer:
    """The responses, stop token included, and log-probs where the peer has them at no cost."""

    tokens: list[list[int]]
    logprobs: list[list[float]] | None = field(default=None)


class Generator(Protocol):
    """Answers requests."""

    def __call__(self, request: Request) -> Answer: ...


class Peer(Protocol):
    """What a module of this package is."""

    ABOUT: str

    def why_not(self, subject: Subject) -> str | None: ...

    def generator(self, subject: Subject) -> AbstractContextManager[Generator]: ...


def find_peer(name: str) -> Peer:
    """The module of a peer. Raises ValueError for an unknown name."""
    if name not in PEERS:
        raise ValueError(f"no peer {name!r}: use some of {', '.join(PEERS)}")
    return cast(Peer, importlib.import_module(f"rlhf.bench.peers.{PEERS[name]}"))


def reason_of(error: Exception) -> str:
    """The kind of an error and its first line, for a note."""
    line = (str(error).strip().splitlines() or [""])[0][:200]
    return f"{type(error).__name__}: {line}"
