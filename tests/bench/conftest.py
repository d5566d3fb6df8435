"""A subject of a few layers, made once."""

from __future__ import annotations

import pytest

from rlhf.bench.subject import Subject, load_subject


@pytest.fixture(scope="session")
def subject() -> Subject:
    return load_subject("tiny", device="cpu")
