"""What the data tests share: real rows, a small tokenizer, a private cache."""

from pathlib import Path

import datasets
import pytest
from transformers import PreTrainedTokenizerFast

from rlhf.data import train_tokenizer

REAL_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
CORPUS = [
    "the cat sat on the mat and the dog sat on the log.",
    "What is two and two? Two and two is four.",
    "Human: hello there. Assistant: good day to you.",
]


@pytest.fixture
def real_data() -> Path:
    if not REAL_DATA.is_dir():
        pytest.skip(f"no real rows: {REAL_DATA} is not there")
    return REAL_DATA


@pytest.fixture(autouse=True)
def private_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path_factory.mktemp("datasets_cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(CORPUS, vocab_size=320)
