"""A key of its own for every sequence, from what it is and not from where it stands."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter


def sequence_seeds(prompts: list[list[int]], seed: int) -> list[int]:
    """One Philox key for each prompt, in [0, 2^63): `seed`, then 32 bits of a hash.

    The hash is of the prompt and of how many equal prompts come before it. So the same seed gives
    a prompt the same draws whatever the batch around it, and its n responses different ones.
    """
    before: Counter[bytes] = Counter()
    keys = []
    for prompt in prompts:
        tokens = array("q", prompt).tobytes()
        nth = before[tokens].to_bytes(8, "little")
        before[tokens] += 1
        digest = hashlib.blake2b(nth + tokens, digest_size=4).digest()
        keys.append(seed << 32 | int.from_bytes(digest, "little"))
    return keys
