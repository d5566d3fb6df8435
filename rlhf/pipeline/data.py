"""The rows of a step, encoded, and checked against the models that are to read them."""

from __future__ import annotations

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf import distributed
from rlhf.config import STEPS, DataConfig, RunConfig
from rlhf.data import DataBlend, Purpose, Split, shares_of
from rlhf.models import check_positions

NORMALISATION_ROWS = 512  # on which the reward model is set to mean 0, std 1


def data_of(config: RunConfig, section: DataConfig, purpose: Purpose) -> DataBlend:
    """The datasets of a section, and of them the share of the step that has this purpose."""
    fractions = config.fractions
    share = shares_of(fractions)[STEPS.index(purpose)] if fractions else (0.0, 1.0)
    return DataBlend(config.data_of(section), purpose, share=share, seed=config.seed)


def encoded(data: DataBlend, split: Split, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """One rank fills the cache, the others read it."""
    with distributed.first_rank_first():
        return data.encoded(split, tokenizer)


def training_rows(
    data: DataBlend, tokenizer: PreTrainedTokenizerBase, model: nn.Module, *, option: str
) -> tuple[Dataset, Dataset]:
    """Both sides, to train on and held out. Raises ValueError for rows that the model has no
    positions for."""
    train, test = (
        check_positions(encoded(data, split, tokenizer), model, option=option)
        for split in ("train", "test")
    )
    return train, test


def prompts(
    data: DataBlend,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    *models: nn.Module | None,
    option: str,
    max_new_tokens: int,
) -> Dataset:
    """Raises ValueError for prompts to which not all of the models can read a whole response."""
    rows = encoded(data, split, tokenizer)
    for model in models:
        if model is not None:
            check_positions(rows, model, option=option, max_new_tokens=max_new_tokens)
    return rows


def mixture(config: RunConfig, tokenizer: PreTrainedTokenizerBase, actor: nn.Module) -> Dataset:
    """Demonstrations or text to learn beside PPO."""
    given = config.ppo.ptx_data
    data = data_of(config, given or config.sft.data, "demonstrations")
    option = "ppo.ptx_data" if given else "sft.data"
    return check_positions(encoded(data, "train", tokenizer), actor, option=option)


def normalisation_answers(
    config: RunConfig, pairs: Dataset, tokenizer: PreTrainedTokenizerBase, *, positions: int
) -> list[list[int]]:
    """What the reward model is to score 0 on average: demonstrations, or the pairs' better sides
    where the pairs are the user's and the demonstrations made up.

    Args:
        positions: what the model has; of longer demonstrations it gets the last tokens.
    """
    made_up = config.is_synthetic(config.sft.data) and not config.is_synthetic(config.reward.data)
    if made_up:
        return pairs[:NORMALISATION_ROWS]["chosen_ids"]
    data = data_of(config, config.sft.data, "demonstrations")
    rows = encoded(data, "train", tokenizer)[:NORMALISATION_ROWS]
    return [ids[-positions:] for ids in rows["input_ids"]]
