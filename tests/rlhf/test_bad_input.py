"""Data and models that lack something: a message that says what to do, or a way that is written."""

from __future__ import annotations

import io
import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from rlhf.config import DataConfig, ModelConfig, RewardConfig, RunConfig, SFTConfig
from rlhf.data import load_tokenizer
from rlhf.models import load_causal_lm, load_scorer, sequence_scores
from rlhf.pipeline import Pipeline
from tests.rlhf.tiny import LLAMA, write_rows

WORDS = ["yes", "no", "say", "Human", "Assistant", ":", *map(str, range(60))]


def pairs(chosen: str, rejected: str) -> list[dict[str, str]]:
    return [{"prompt": f"say {i}", "chosen": chosen, "rejected": rejected} for i in range(60)]


def base_model(folder: Path, **special: str) -> str:
    """A causal language model whose tokenizer has only the special tokens given here."""
    from transformers import AutoConfig, AutoModelForCausalLM

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<end>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, **special)
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    options = {**LLAMA, **tokens, "vocab_size": len(vocabulary)}
    config = AutoConfig.for_model(options.pop("model_type"), **options)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def pipeline(tmp_path: Path, **sections: Any) -> Pipeline:
    config = RunConfig(output_dir=str(tmp_path / "out"), **sections)
    return Pipeline(config, Console(file=io.StringIO()))


def test_all_pairs_equal(tmp_path: Path) -> None:
    data = DataConfig(name=write_rows(tmp_path / "pairs.jsonl", pairs("yes", "yes")))
    base = base_model(tmp_path / "base", eos_token="<end>")
    with pytest.raises(ValueError, match=r"nothing to learn from: in all its 60 rows .* the same"):
        pipeline(tmp_path, reward=RewardConfig(data=data, model_path=base)).reward()


def test_some_completions_empty(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Skipped and counted."""
    rows = [*pairs("yes", "no"), {"prompt": "say 1", "chosen": "", "rejected": "no"}]
    data = DataConfig(name=write_rows(tmp_path / "pairs.jsonl", rows), heldout_fraction=0.2)
    base = base_model(tmp_path / "base", eos_token="<end>")
    with caplog.at_level(logging.WARNING, logger="rlhf"):
        pipeline(tmp_path, sft=SFTConfig(data=data), model=ModelConfig(path=base)).sft()
    assert any("dropped 1 of 61 rows with an empty" in r.getMessage() for r in caplog.records)


def test_a_tokenizer_without_eos(tmp_path: Path) -> None:
    base = base_model(tmp_path / "base")
    data = DataConfig(name=write_rows(tmp_path / "pairs.jsonl", pairs("yes", "no")))
    with pytest.raises(ValueError, match=r"no EOS token.*model\.eos_token"):
        pipeline(tmp_path, sft=SFTConfig(data=data), model=ModelConfig(path=base)).sft()
    told = ModelConfig(path=base, eos_token="<end>")
    pipeline(tmp_path, sft=SFTConfig(data=data), model=told).sft()
    assert load_tokenizer(tmp_path / "out" / "sft").eos_token == "<end>"


def test_a_base_without_padding_becomes_a_reward_model(tmp_path: Path) -> None:
    """It gets a padding token; anyone who loads it reads the same scores from a padded batch."""
    base = base_model(tmp_path / "base", eos_token="<end>")
    data = DataConfig(
        name=write_rows(tmp_path / "pairs.jsonl", pairs("yes", "no")), heldout_fraction=0.2
    )
    pipeline(
        tmp_path, reward=RewardConfig(data=data, model_path=base, batch_size=8), sft=SFTConfig(data)
    ).reward()
    folder = tmp_path / "out" / "reward"
    tokenizer = load_tokenizer(folder)
    settings = json.loads((folder / "config.json").read_text())
    assert settings["pad_token_id"] == tokenizer.pad_token_id != tokenizer.eos_token_id
    ids, lengths = torch.full((2, 5), tokenizer.pad_token_id), torch.tensor([5, 3])
    for row, length in enumerate(lengths):
        ids[row, : int(length)] = torch.arange(2, 2 + int(length))
    with torch.no_grad():
        ours = load_scorer(str(folder), tokenizer, dtype=torch.float32).eval()
        theirs: Any = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        mask = (torch.arange(5) < lengths[:, None]).long()
        logits = theirs(input_ids=ids, attention_mask=mask).logits[:, 0]
        expected = logits - ours.config.score_mean
    torch.testing.assert_close(sequence_scores(ours, ids, lengths), expected)


def damaged(folder: Path, how: str) -> str:
    """A model whose weights are cut off, of another shape than its config's, or another model's."""
    base_model(folder, eos_token="<end>")
    if how == "cut-off":
        weights = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    else:
        name = "intermediate_size" if how == "other-shape" else "num_hidden_layers"
        settings = json.loads((folder / "config.json").read_text())
        settings |= {name: 2 * settings[name]}
        (folder / "config.json").write_text(json.dumps(settings))
    return str(folder)


@pytest.mark.parametrize("scores", [False, True], ids=["sft", "reward"])
@pytest.mark.parametrize("how", ["cut-off", "other-shape", "layers-missing"])
def test_weights_that_are_not_the_models(tmp_path: Path, how: str, scores: bool) -> None:
    """HF would make up what is missing, and go on."""
    base = damaged(tmp_path / "base", how)
    tokenizer = load_tokenizer(base)
    message = {
        "cut-off": "deserializing header",
        "other-shape": r"6 weights of its config are missing .* such as model\.layers\.0\.mlp",
        "layers-missing": r"18 weights of its config are missing .* such as model\.layers\.2",
    }[how]
    load = partial(load_scorer, fresh_head=True) if scores else load_causal_lm
    with pytest.raises(ValueError, match=message):
        load(base, tokenizer, dtype=torch.float32)
