"""The datasets of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf.config.checks import fraction, positive


@dataclass(frozen=True)
class SourceConfig:
    """One dataset of a mix."""

    name: str = "synthetic"
    """`synthetic`, `arithmetic`, a .json, .jsonl, .parquet or .arrow file, a folder, a hub name."""
    subset: str | None = None
    """Configuration of a hub dataset."""
    splits: dict[Literal["train", "test"], str] | None = None
    """The dataset's names for its splits, such as {train: train_prefs, test: test_prefs}."""
    columns: dict[str, str] | None = None
    """Our name for a column -> the dataset's, such as {prompt: instruction}."""
    weight: float | None = None
    """Share of the rows, in any unit; default: the number of rows it has."""

    def __post_init__(self) -> None:
        if self.weight is not None and self.weight <= 0:
            raise ValueError(f"weight must be positive, got {self.weight}; leave the dataset out")


@dataclass(frozen=True)
class DataConfig:
    """The data of one step: a dataset, or several mixed."""

    name: str = "synthetic"
    """`synthetic`, `arithmetic`, a .json, .jsonl, .parquet or .arrow file, a folder, a hub name."""
    subset: str | None = None
    """Configuration of a hub dataset."""
    splits: dict[Literal["train", "test"], str] | None = None
    """The dataset's names for its splits, such as {train: train_prefs, test: test_prefs}."""
    columns: dict[str, str] | None = None
    """Our name for a column -> the dataset's, such as {prompt: instruction}."""
    mix: list[SourceConfig] | None = None
    """Instead of name: several datasets, such as [{name: a, weight: 2}, {name: b, weight: 1}]."""
    rows: int | None = None
    """At most so many training rows; for `synthetic`, how many to generate."""
    heldout_rows: int = 500
    """At most so many rows held out for evaluation."""
    heldout_fraction: float = 0.05
    """Share of the prompts held out when the dataset has no such split."""
    max_length: int = 512
    """Tokens of prompt and completion together; a PPO prompt alone."""

    def __post_init__(self) -> None:
        positive(self, "rows", "heldout_rows", "max_length")
        fraction(self, "heldout_fraction")
        if self.mix is not None and not self.mix:
            raise ValueError("mix is empty: give at least one dataset, or leave it out")
        if len({source.weight is None for source in self.sources}) > 1:
            raise ValueError("mix: give every dataset a weight, or none")

    @property
    def sources(self) -> list[SourceConfig]:
        """The datasets to mix; one where there is no mix."""
        if self.mix is not None:
            return self.mix
        return [SourceConfig(self.name, self.subset, self.splits, self.columns)]
