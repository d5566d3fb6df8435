"""The family that docs/models.md adds works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import hybrid_engine as he
from hybrid_engine.models import FAMILIES

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "phi", None)  # undone at the end
    first_block = re.search(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert first_block is not None
    exec(first_block[1], {})


@pytest.mark.usefixtures("example")
def test_the_example_family_gives_the_tokens_of_hf(build, hf_greedy, prompts) -> None:
    model = build("phi")
    params = he.SamplingParams(max_new_tokens=24, temperature=0.0)
    rollout = he.HybridEngine(model).generate(prompts, params)
    for i, prompt in enumerate(prompts):
        assert rollout.response(i) == hf_greedy(model, prompt, 24), f"prompt {i}"
    state = he.acceleration(he.accelerate(model))
    assert state is not None
    assert state.check.passed


def test_every_family_is_on_the_page() -> None:
    text = PAGE.read_text()
    assert len(text.splitlines()) < 100
    for family in FAMILIES:
        assert f"`{family}`" in text
