"""Which prompt goes where: a stable hash of its text decides, so none is ever in two places."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
Share = tuple[float, float]  # from and up to where in [0, 1) a step's prompts lie


def is_heldout(prompt_text: str, fraction: float) -> bool:
    """Whether a prompt belongs to the held-out `fraction`: the same answer in every process."""
    return _place(prompt_text, 0) < fraction


def is_in_share(prompt_text: str, share: Share) -> bool:
    """Whether a prompt belongs to a step's share; independent of whether it is held out."""
    return share[0] <= _place(prompt_text, 1) < share[1]


def shares_of(fractions: Sequence[float]) -> list[Share]:
    """Cut [0, 1) in proportion to the fractions: 2, 4, 4 gives (0, 0.2), (0.2, 0.6), (0.6, 1)."""
    total = sum(fractions)
    if total <= 0 or min(fractions) < 0:
        raise ValueError(f"fractions must be 0 or more, and one above 0, got {list(fractions)}")
    ends = [sum(fractions[: i + 1]) / total for i in range(len(fractions))]
    ends = [1.0 if end > 1 - 1e-9 else end for end in ends]
    return list(zip([0.0, *ends[:-1]], ends, strict=True))


def check_split(split: str) -> None:
    """Raise ValueError unless `split` is one of the two names that this package uses."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: choose 'train' or 'test'")


def _place(prompt_text: str, number: int) -> float:
    """In [0, 1); places of different numbers are independent."""
    digest = hashlib.sha256(prompt_text.strip().encode()).digest()
    return (int.from_bytes(digest[8 * number : 8 * number + 8], "big") >> 11) / 2**53
