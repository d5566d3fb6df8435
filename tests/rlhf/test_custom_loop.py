"""examples/custom_loop.py learns what it is rewarded for, and its advantage is what it says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "custom_loop.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("custom_loop", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_learns(example, capsys) -> None:
    scores = example.main(iterations=40)
    assert len(capsys.readouterr().out.splitlines()) == 40
    assert sum(scores[-5:]) / 5 > sum(scores[:3]) / 3 + 0.15


def test_its_advantage_by_hand(example) -> None:
    rewards = torch.tensor([[3.0], [1.0], [2.0], [5.0], [5.0]])
    groups = torch.tensor([0, 0, 0, 1, 1])
    found = example.rank(rewards, torch.ones(5, 1, dtype=torch.bool), groups)
    assert found.flatten().tolist() == [1.0, -1.0, 0.0, 0.0, 0.0]
