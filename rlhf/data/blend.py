"""Several datasets as one, in given proportions."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from datasets import Dataset, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from rlhf.config import DataConfig, SourceConfig
from rlhf.data.encoding import encode_demonstrations, encode_preferences, encode_prompts
from rlhf.data.formats import Purpose
from rlhf.data.sources import load_rows
from rlhf.data.split import Share, Split

_ENCODERS = {
    "demonstrations": encode_demonstrations,
    "preferences": encode_preferences,
    "prompts": encode_prompts,
}


class DataBlend:
    """The datasets of one step: canonical rows of each, and all of them encoded and mixed."""

    def __init__(
        self, config: DataConfig, purpose: Purpose, *, share: Share = (0.0, 1.0), seed: int = 0
    ) -> None:
        self._config = config
        self._purpose: Purpose = purpose
        self._share = share
        self._seed = seed

    def parts(self, split: Split) -> list[Dataset]:
        """Canonical rows, a dataset for each source. Raises what `load_rows` raises."""
        return [self._load(source, split) for source in self._config.sources]

    def encoded(self, split: Split, tokenizer: PreTrainedTokenizerBase) -> Dataset:
        """Ids of all sources, in the proportions of their weights, at most so many as configured.

        Raises what `load_rows`, the encoder and `blend` raise.
        """
        encode = _ENCODERS[self._purpose]
        limit = self._config.max_length
        parts = [encode(part, tokenizer, max_length=limit) for part in self.parts(split)]
        weights = [source.weight for source in self._config.sources]
        return blend(
            parts,
            None if None in weights else [weight for weight in weights if weight is not None],
            rows=self._limit(split),
            seed=self._seed,
        )

    def _load(self, source: SourceConfig, split: Split) -> Dataset:
        return load_rows(
            source.name,
            purpose=self._purpose,
            split=split,
            subset=source.subset,
            splits=source.splits,
            columns=source.columns,
            heldout_fraction=self._config.heldout_fraction,
            share=self._share,
            max_rows=self._limit(split),
            seed=self._seed,
        )

    def _limit(self, split: Split) -> int | None:
        return self._config.rows if split == "train" else self._config.heldout_rows


def blend(
    parts: Sequence[Dataset], weights: Sequence[float] | None, *, rows: int | None, seed: int = 0
) -> Dataset:
    """One dataset of several.

    Args:
        parts: with the same columns; a column that one has and another lacks is None there.
        weights: shares of the rows of the result, in any unit. A part that has too few is repeated
            as often as needed, of one with too many a random part is taken. None: every row once.
        rows: at most so many; by default as many as the parts have together.

    The order is random but for a single part. Raises ValueError for columns of different types.
    """
    if len(parts) == 1:
        return parts[0] if rows is None else parts[0].select(range(min(rows, len(parts[0]))))
    sizes = [len(part) for part in parts]
    total = sum(sizes) if rows is None else min(rows, sum(sizes)) if weights is None else rows
    counts = _apportion(total, sizes if weights is None else weights)
    rng = Random(seed)
    chosen, start = [], 0
    for size, count in zip(sizes, counts, strict=True):
        passes, rest = divmod(count, size)
        chosen += [start + i for i in [*range(size)] * passes + rng.sample(range(size), rest)]
        start += size
    rng.shuffle(chosen)
    return _joined(parts).select(chosen)


def _apportion(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to the weights that add up to the total: largest remainders."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: counts[i] - exact[i])
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _joined(parts: Sequence[Dataset]) -> Dataset:
    for name in {name for part in parts for name in part.column_names}:
        types = {str(part.features[name]) for part in parts if name in part.column_names}
        if len(types) > 1:
            raise ValueError(
                f"datasets of one mix differ in their column {name!r}: {' and '.join(types)}. Plain"
                " texts do not mix with messages: map the columns of one, or drop it"
            )
    return concatenate_datasets(list(parts))
