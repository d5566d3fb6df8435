"""Who is held out: a stable hash of the prompt decides, so that no prompt is ever on both sides."""

from __future__ import annotations

import hashlib
from typing import Literal

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")


def is_heldout(prompt_text: str, fraction: float) -> bool:
    """Whether a prompt belongs to the held-out `fraction`: the same answer in every process."""
    digest = hashlib.sha256(prompt_text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def check_split(split: str) -> None:
    """Raise ValueError unless `split` is one of the two names that this package uses."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose 'train' or 'test'")
