"""The tests that docs/rlhf.md links each detail to are there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_linked_test_exists() -> None:
    text = (ROOT / "docs" / "rlhf.md").read_text()
    table = text[text.index("## What is tested where") :]
    path, found = Path(), 0
    for file, function in re.findall(r"`([\w/.]*\.py)?(?:::(\w+))?(?:\[[\w-]+\])?`", table):
        if file:
            path = ROOT / (file if "/" in file else f"tests/rlhf/{file}")
            assert path.is_file(), path
        if function:
            assert f"def {function}(" in path.read_text(), f"{path}: {function}"
        found += bool(file or function)
    assert found > 40
