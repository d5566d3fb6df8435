from __future__ import annotations

from pathlib import Path

from hybrid_engine import ops

PAGE = Path(__file__).resolve().parents[2] / "docs" / "ops.md"


def test_every_op_has_a_row():
    """Backward ops are parts of the op they belong to."""
    rows = [line.split("|")[1] for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    public = {name for name in ops.OPS if name in ops.__all__}
    assert public <= {name.strip(" `") for row in rows for name in row.split(",")}
