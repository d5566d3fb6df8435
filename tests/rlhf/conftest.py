"""What the RLHF tests share: a tokenizer of 280 tokens, and models of two layers that use it."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from rlhf.cli.main import main
from rlhf.data import train_tokenizer
from rlhf.models import build_causal_lm
from tests.rlhf.tiny import LLAMA, write_config

Builder = Callable[..., nn.Module]

INIT: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "opt": {
        "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128,
    },
}  # fmt: skip


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["count from 3 to 6", "sure: tea cat."], vocab_size=280)


@pytest.fixture
def causal_lm(tokenizer: PreTrainedTokenizerFast) -> Builder:
    """A random causal language model whose hidden states depend on every token before."""

    def build(family: str = "llama", *, seed: int = 0, **options: Any) -> nn.Module:
        init = {**INIT[family], "model_type": family, **options}
        return _scramble(build_causal_lm(init, tokenizer, dtype=torch.float32), seed)

    return build


@pytest.fixture
def scorer(causal_lm: Builder) -> Builder:
    """A random sequence classifier with one label: a reward model, or a critic."""

    def build(family: str = "llama", *, seed: int = 0, **options: Any) -> nn.Module:
        config: Any = causal_lm(family, **options).config
        config.num_labels = 1
        return _scramble(AutoModelForSequenceClassification.from_config(config), seed)

    return build


def _scramble(model: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            parameter.data = noise / parameter.shape[1] ** 0.5
        else:
            parameter.data += 0.2 * noise
    return model.eval()


@pytest.fixture
def sequences() -> list[list[int]]:
    """Ragged token ids; some text holds the pad id and the EOS in its middle."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(6, 280, (n,), generator=generator).tolist() for n in (9, 4, 17, 12)]
    rows[2][5], rows[3][4] = 0, 2
    return rows


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), force_terminal=False, width=100)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Bitwise repeatability is promised on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets_cache")


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    return write_config(tmp_path)


@pytest.fixture
def rlhf(config_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Run a step of the tiny configuration; the exit code and what it said on stderr."""

    def run(step: str, *arguments: str) -> tuple[int, str]:
        command = [step, "--config", str(config_file), "--output_dir", str(tmp_path / "out")]
        capfd.readouterr()
        try:
            code = main([*command, *arguments])
        except SystemExit as exit:
            code = int(exit.code or 0)
        return code, capfd.readouterr().err

    return run
