"""What the steps make of their data: too long for the model, or made up where the rest is real."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from rich.console import Console

from rlhf.config import (
    DataConfig,
    DPOConfig,
    ModelConfig,
    PPOConfig,
    RewardConfig,
    RunConfig,
    SFTConfig,
)
from rlhf.data import encode_preferences, load_rows
from rlhf.models import build_causal_lm, check_positions, load_scorer, save_model, sequence_scores
from rlhf.pipeline import Pipeline
from tests.rlhf.tiny import write_rows

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {
        "model_type": "opt", **SIZES, "word_embed_proj_dim": 32, "ffn_dim": 64,
        "max_position_embeddings": 64,
    },
    "llama": {
        "model_type": "llama", **SIZES, "intermediate_size": 64, "max_position_embeddings": 64,
    },
    "bloom": {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 4},
}  # fmt: skip


@pytest.fixture
def base(tokenizer, tmp_path: Path):
    """The folder of a model of 64 positions."""

    def base(family: str) -> str:
        save_model(
            build_causal_lm(MODELS[family], tokenizer, dtype=torch.float32),
            tokenizer,
            tmp_path / family,
        )
        return str(tmp_path / family)

    return base


def pairs(path: Path, *, words: int) -> str:
    """A word is at least a token of the prompt."""
    rows = [
        {"prompt": f"{i} " + "x " * words, "chosen": f"yes {i}", "rejected": "no"}
        for i in range(40)
    ]
    return write_rows(path, rows)


def pipeline(tmp_path: Path, **sections: Any) -> Pipeline:
    config = RunConfig(output_dir=str(tmp_path / "out"), **sections)
    return Pipeline(config, Console(file=io.StringIO()))


def step(name: str, path: str, data: DataConfig) -> dict[str, Any]:
    """The sections of a run of this step on this model and data."""
    return {
        "sft": {"sft": SFTConfig(data=data)},
        "reward": {"reward": RewardConfig(data=data, model_path=path)},
        "dpo": {"dpo": DPOConfig(data=data, model_path=path)},
        "ppo": {
            "ppo": PPOConfig(
                data=data, actor_path=path, reward_functions=["builtins:len"], max_new_tokens=20
            )
        },
    }[name]


LONG = {
    "sft": r"sft\.data\.max_length: rows of \d{3} tokens, the model has 64 positions: set it to 64",
    "reward": r"reward\.data\.max_length: rows of \d{3} tokens, .*set it to 64 or less",
    "dpo": r"dpo\.data\.max_length: rows of \d{3} tokens, .*set it to 64 or less",
    "ppo": r"ppo\.data\.max_length: rows of \d{3} tokens and responses of 20, .* set it to 44",
}


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
@pytest.mark.parametrize("name", LONG)
def test_rows_longer_than_the_models_positions(
    base, tmp_path: Path, name: str, family: str
) -> None:
    path = base(family)
    data = DataConfig(name=pairs(tmp_path / "long.jsonl", words=90), heldout_fraction=0.3)
    run = pipeline(tmp_path, model=ModelConfig(path=path), **step(name, path, data))
    with pytest.raises(ValueError, match=LONG[name]):
        getattr(run, name)()
    assert not (tmp_path / "out" / name / "config.json").exists()


def test_no_room_for_a_response_at_all(base, tmp_path: Path) -> None:
    path = base("llama")
    data = DataConfig(name=pairs(tmp_path / "short.jsonl", words=1), heldout_fraction=0.3)
    ppo = PPOConfig(
        data=data, actor_path=path, reward_functions=["builtins:len"], max_new_tokens=64
    )
    with pytest.raises(ValueError, match="64 positions: lower max_new_tokens"):
        pipeline(tmp_path, ppo=ppo).ppo()


@pytest.mark.parametrize("family", MODELS)
def test_the_longest_row_counts_and_not_the_limit(tokenizer, family: str) -> None:
    """On both sides of a pair; a model without an end has room for all."""
    model = build_causal_lm(MODELS[family], tokenizer, dtype=torch.float32)

    def rows(chosen: int, rejected: int) -> Dataset:
        return Dataset.from_dict(
            {"chosen_ids": [[1], [1] * chosen], "rejected_ids": [[1] * rejected, [1]]}
        )

    for fitting in (rows(64, 2), rows(2, 64)):
        assert check_positions(fitting, model, option="reward.data") is fitting
    for long in (rows(65, 2), rows(2, 65)):
        if family == "bloom":
            assert check_positions(long, model, option="reward.data") is long
        else:
            with pytest.raises(ValueError, match="rows of 65 tokens"):
                check_positions(long, model, option="reward.data")


@pytest.mark.parametrize("demonstrations", [False, True], ids=["none-given", "given"])
def test_what_the_reward_model_is_normalised_on(
    base, tokenizer, tmp_path: Path, demonstrations: bool
) -> None:
    """Demonstrations if the user has given some; else the better sides of his pairs."""
    data = DataConfig(
        name=pairs(tmp_path / "pairs.jsonl", words=1), heldout_fraction=0.2, max_length=64
    )
    rows = [{"prompt": f"a{i} ", "completion": "b"} for i in range(40)]
    sft = DataConfig(name=write_rows(tmp_path / "given.jsonl", rows), heldout_fraction=0.2)
    sections = {"sft": SFTConfig(data=sft)} if demonstrations else {}
    reward = RewardConfig(data=data, model_path=base("llama"), batch_size=8)
    pipeline(tmp_path, reward=reward, **sections).reward()
    model = load_scorer(str(tmp_path / "out" / "reward"), tokenizer, dtype=torch.float32).eval()
    found = load_rows(data.name, purpose="preferences", heldout_fraction=0.2)
    chosen = encode_preferences(found, tokenizer, max_length=64)["chosen_ids"]
    with torch.no_grad():
        scores = torch.cat(
            [
                sequence_scores(model, torch.tensor([ids]), torch.tensor([len(ids)]))
                for ids in chosen
            ]
        )
    is_normal = abs(float(scores.mean())) < 1e-3 and abs(float(scores.std(correction=0)) - 1) < 1e-3
    assert is_normal is not demonstrations


def test_demonstrations_too_long_for_the_reward_model_are_cut(base, tmp_path: Path) -> None:
    """GPT-2 has no position to read them at; their last tokens are what it scores in PPO too."""
    data = DataConfig(name=pairs(tmp_path / "pairs.jsonl", words=1), heldout_fraction=0.2)
    sft = DataConfig(name=pairs(tmp_path / "long.jsonl", words=58), heldout_fraction=0.2)
    reward = RewardConfig(data=data, model_path=base("gpt2"), batch_size=8)
    run = pipeline(tmp_path, reward=reward, sft=SFTConfig(data=sft))
    run.reward()
    assert run.report.reward is not None
    assert run.report.reward["score_std"] > 0


MINE = DataConfig(name="prompts.jsonl")
MIXED = [
    ({"ppo": PPOConfig(data=MINE, ptx_coef=0.5)}, True),
    ({"ppo": PPOConfig(data=MINE)}, False),
    ({"ppo": PPOConfig(ptx_coef=0.5)}, False),
    ({"ppo": PPOConfig(data=MINE, ptx_coef=0.5, ptx_data=MINE)}, False),
    ({"ppo": PPOConfig(data=MINE, ptx_coef=0.5), "sft": SFTConfig(data=MINE)}, False),
    ({"ppo": PPOConfig(data=MINE, ptx_coef=0.5), "data_path": ["prompts.jsonl"]}, False),
]


@pytest.mark.parametrize(
    ("sections", "refused"),
    MIXED,
    ids=["own-prompts", "no-mixture", "all-made-up", "own-ptx", "own-sft", "one-path-for-all"],
)
def test_made_up_text_is_not_mixed_into_a_real_run(sections: dict[str, Any], refused: bool) -> None:
    if refused:
        with pytest.raises(ValueError, match=r"give ppo\.ptx_data or sft\.data"):
            RunConfig(**sections)
    else:
        RunConfig(**sections)
