"""Ratios to compare with: what was once measured, committed, and what is measured now.

Times differ between machines; the ratio of a contender to its baseline in the same run differs
less. A case has regressed when its ratio has fallen under `TOLERANCE` of the recorded one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOLERANCE = 0.75


@dataclass(frozen=True)
class Change:
    """One case, then and now; a case of one side only has None on the other."""

    case: str
    before: float | None
    now: float | None

    @property
    def regressed(self) -> bool:
        return self.before is not None and self.now is not None and self.now < self.allowed

    @property
    def allowed(self) -> float:
        """The least ratio that is no regression."""
        return TOLERANCE * (self.before or 0.0)

    @property
    def verdict(self) -> str:
        if self.before is None:
            return "new"
        if self.now is None:
            return "not run"
        return f"REGRESSED, under {self.allowed:.2f}" if self.regressed else "ok"


def compare(before: Mapping[str, float], now: Mapping[str, float]) -> list[Change]:
    """Every case of either side, those of `now` first, in their order."""
    cases = dict.fromkeys([*now, *before])
    return [Change(case, before.get(case), now.get(case)) for case in cases]


def read_baseline(path: Path) -> dict[str, float]:
    """The ratios by case; empty where there is no file yet."""
    if not path.exists():
        return {}
    ratios: dict[str, float] = json.loads(path.read_text())["ratios"]
    return ratios


def write_baseline(path: Path, ratios: Mapping[str, float], machine: Mapping[str, Any]) -> None:
    """Ratios with the machine that they are of; cases that were not run keep their old ratio."""
    kept = {**read_baseline(path), **{case: round(ratio, 3) for case, ratio in ratios.items()}}
    path.write_text(json.dumps({"machine": dict(machine), "ratios": kept}, indent=1) + "\n")
