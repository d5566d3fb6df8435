"""The smallest run of the command line: a Llama of two layers, a few rows, and what it said."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
DATA = {"rows": 16, "heldout_rows": 8, "max_length": 120}
TINY: dict[str, Any] = {
    "model": {"init": LLAMA, "vocab_size": 280},
    "sft": {"data": DATA, "batch_size": 8},
    "reward": {"data": DATA, "batch_size": 8},
    "dpo": {"data": DATA, "batch_size": 8, "max_new_tokens": 6},
    "ppo": {
        "data": {**DATA, "max_length": 100}, "iterations": 2, "batch_size": 4, "max_new_tokens": 6,
    },
    "evaluation": {"prompts": 4, "samples": 2, "metric": "rlhf.data.synthetic:quality"},
}  # fmt: skip


def write_config(folder: Path, **sections: Any) -> Path:
    """The tiny run as YAML, with these sections in place of its own."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({**TINY, **sections}))
    return path


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> str:
    """A .jsonl file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def error_line(found: tuple[int, str]) -> str:
    """The one line of a user error, from an exit code and what stood on stderr."""
    code, stderr = found
    assert code == 2
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if "error:" in line]
    assert len(lines) == 1, stderr
    assert stderr.splitlines()[-1] == lines[0]
    return lines[0]
