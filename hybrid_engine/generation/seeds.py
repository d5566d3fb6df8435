"""A key of its own for every sequence, from what it is and not from where it stands."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter


def sequence_seeds(prompts: list[list[int]], seed: int, *, rank: int = 0) -> list[int]:
    """One Philox key for each prompt, in [0, 2^63): `seed`, then 32 bits of a hash.

    The hash is of the prompt, of how many equal prompts come before it, and of the rank. So the
    same seed gives a prompt the same draws whatever the batch around it, its n responses different
    ones, and equal prompts of several ranks too. Ranks that divide one batch among them may instead
    take their parts of the seeds of the whole batch: then they draw what one process would.
    """
    salt = rank.to_bytes(8, "little")  # zeros are no salt: rank 0 draws what one process does
    before: Counter[bytes] = Counter()
    keys = []
    for prompt in prompts:
        tokens = array("q", prompt).tobytes()
        nth = before[tokens].to_bytes(8, "little")
        before[tokens] += 1
        digest = hashlib.blake2b(nth + tokens, digest_size=4, salt=salt).digest()
        keys.append(seed << 32 | int.from_bytes(digest, "little"))
    return keys
