"""The way in which DeepSpeed-Chat's users write their data options."""

from __future__ import annotations

import json
from collections.abc import Sequence

LIST_OPTION = "--data_path"


def as_lists(argv: Sequence[str]) -> list[str]:
    """Turn `--data_path A B` into `--data_path=["A", "B"]`; everything else stays.

    (`--data_split 2,4,4` needs no help.)
    """
    arguments: list[str] = []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        if argument == LIST_OPTION and rest and not rest[0].startswith(("[", "-")):
            names = []
            while rest and not rest[0].startswith("-"):
                names.append(rest.pop(0))
            argument = f"{LIST_OPTION}={json.dumps(names)}"
        arguments.append(argument)
    return arguments
