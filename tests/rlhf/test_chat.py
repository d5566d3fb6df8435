"""A conversation that outgrows the model's positions goes on without its oldest exchanges."""

from __future__ import annotations

from pathlib import Path

import pytest

from hybrid_engine import SamplingParams
from rlhf.cli.chat import Conversation
from rlhf.models import save_model

PARAMS = SamplingParams(max_new_tokens=24, temperature=0.0)


@pytest.fixture
def folder(causal_lm, tokenizer, tmp_path: Path) -> str:
    save_model(causal_lm(max_position_embeddings=128), tokenizer, tmp_path / "model")
    return str(tmp_path / "model")


def test_the_oldest_exchanges_make_room(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation(folder)
    for _ in range(6):
        conversation.say("count from 3 to 6, please", PARAMS)
    assert "[without the first " in capsys.readouterr().out


def test_a_long_message_is_refused_and_forgotten(
    folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = Conversation(folder)
    conversation.say("count to 6", PARAMS)
    with pytest.raises(ValueError, match="the message is longer than 104 tokens"):
        conversation.say("xyz " * 200, PARAMS)
    capsys.readouterr()
    conversation.say("count to 6", PARAMS)
    assert "without" not in capsys.readouterr().out
