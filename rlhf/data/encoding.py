"""From canonical rows to token ids and loss masks.

Each piece of a rendered row is tokenised on its own and the ids are joined, so no token ever
straddles the border between a prompt and a completion, and the ids of a prompt are a true prefix
of the ids that a model is trained on. What the model says ends with exactly one EOS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, cast

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from rlhf.data.cache import cached, content_digest, map_rows, tokenizer_digest
from rlhf.data.formats import Row
from rlhf.data.rendering import Piece, demonstration_pieces, preference_pieces, prompt_pieces

_ROWS_AT_ONCE = 256
_IDS = List(Value("int32"))


class Demonstration(TypedDict):
    """One training sequence; both lists have the same length, at most max_length."""

    input_ids: list[int]
    loss_mask: list[int]  # 1 where the token is trained: completions with their EOS


class Preference(TypedDict):
    """Two complete sequences with the same prompt; both end with EOS."""

    chosen_ids: list[int]
    rejected_ids: list[int]
    chosen_mask: list[int]  # 1 where the completion is, its EOS included
    rejected_mask: list[int]
    margin: float  # by which the scores should differ at least; 0 where the data says nothing


def encode_demonstration(
    row: Row, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> Demonstration | None:
    """Encode {text}, {messages} or {prompt, completion}, cut at the right to `max_length` tokens.

    Trained are the completion, or every assistant turn of {messages}, or the whole of {text}. A
    sequence that was cut has lost its EOS, so it does not teach to stop there. None if the cut
    leaves nothing to train.
    """
    return _cut(_encode_pieces([demonstration_pieces(row, tokenizer)], tokenizer)[0], max_length)


def encode_preference(
    row: Row, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> Preference | None:
    """Encode {prompt, chosen, rejected}; None if either sequence is over `max_length` tokens.

    Nothing is cut: a score is read at the last token, and that has to be EOS in both.
    """
    chosen, rejected = _encode_pieces(preference_pieces(row, tokenizer), tokenizer)
    if max(len(chosen["input_ids"]), len(rejected["input_ids"])) > max_length:
        return None
    return _pair(row, chosen, rejected)


def encode_prompt(
    row: Row, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> list[int] | None:
    """Encode {prompt} up to where the response begins; None if over `max_length` tokens."""
    pieces = prompt_pieces(row["prompt"], tokenizer)
    ids = _encode_pieces([pieces], tokenizer)[0]["input_ids"]
    return ids if len(ids) <= max_length else None


def encode_answers(rows: list[Row], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Encode {prompt, completion} rows of any length as a reward model reads them: EOS at the end.

    An empty completion is one that says nothing, not one to leave out.
    """
    pieces = [demonstration_pieces(row, tokenizer) for row in rows]
    return [encoded["input_ids"] for encoded in _encode_pieces(pieces, tokenizer)]


def decode_completion(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Decode a response: what stands before its first EOS, without special tokens."""
    kept = list(ids)
    if tokenizer.eos_token_id in kept:
        kept = kept[: kept.index(tokenizer.eos_token_id)]
    return str(tokenizer.decode(kept, skip_special_tokens=True))


def encode_demonstrations(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> Dataset:
    """Encode all rows to columns {input_ids, loss_mask}; what is cut or dropped is logged.

    Raises ValueError if every prompt is over the limit.
    """
    tally = _Tally("prompts", max_length)

    def encode(batch: list[Row]) -> list[Row]:
        encoded = []
        full_rows = _encode_pieces([demonstration_pieces(r, tokenizer) for r in batch], tokenizer)
        for full in full_rows:
            cut = _cut(full, max_length)
            tally.count(len(full["input_ids"]), dropped=cut is None)
            if cut is not None:
                encoded.append(dict(cut))
        return encoded

    return _map(rows, encode, tally, tokenizer, {"input_ids": _IDS, "loss_mask": _IDS})


def encode_preferences(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> Dataset:
    """Encode all rows to the columns of Preference; pairs over the limit are dropped.

    Raises ValueError if every pair is over the limit.
    """
    tally = _Tally("pairs", max_length)

    def encode(batch: list[Row]) -> list[Row]:
        pieces = [side for row in batch for side in preference_pieces(row, tokenizer)]
        sides = _encode_pieces(pieces, tokenizer)
        encoded: list[Row] = []
        for row, chosen, rejected in zip(batch, sides[::2], sides[1::2], strict=True):
            longest = max(len(chosen["input_ids"]), len(rejected["input_ids"]))
            tally.count(longest, dropped=longest > max_length)
            if longest <= max_length:
                encoded.append(dict(_pair(row, chosen, rejected)))
        return encoded

    ids = ("chosen_ids", "rejected_ids", "chosen_mask", "rejected_mask")
    columns = {**dict.fromkeys(ids, _IDS), "margin": Value("float32")}
    return _map(rows, encode, tally, tokenizer, columns)


def encode_prompts(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> Dataset:
    """Add a column {input_ids} to all rows; prompts over the limit are dropped.

    The other columns stay: reward functions are given them. Raises ValueError if every prompt is
    over the limit.
    """
    tally = _Tally("prompts", max_length)

    def encode(batch: list[Row]) -> list[Row]:
        pieces = [prompt_pieces(row["prompt"], tokenizer) for row in batch]
        encoded = []
        for row, full in zip(batch, _encode_pieces(pieces, tokenizer), strict=True):
            ids = full["input_ids"]
            tally.count(len(ids), dropped=len(ids) > max_length)
            if len(ids) <= max_length:
                encoded.append({**row, "input_ids": ids})
        return encoded

    return _map(rows, encode, tally, tokenizer, {**rows.features, "input_ids": _IDS})


def _encode_pieces(
    sequences: list[list[Piece]], tokenizer: PreTrainedTokenizerBase
) -> list[Demonstration]:
    """Tokenise the pieces of many sequences at once and join each sequence's ids and masks."""
    texts = [piece.text for pieces in sequences for piece in pieces]
    ids_of_pieces = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else ())
    first = _leading_ids(tokenizer)
    encoded: list[Demonstration] = []
    for pieces in sequences:
        input_ids: list[int] = []
        loss_mask: list[int] = []
        for piece in pieces:
            ids = (
                _with_one_eos(next(ids_of_pieces), tokenizer)
                if piece.reply
                else next(ids_of_pieces)
            )
            input_ids += ids
            loss_mask += [int(piece.trained)] * len(ids)
        if first and input_ids[:1] != first:
            input_ids, loss_mask = first + input_ids, [0, *loss_mask]
        encoded.append({"input_ids": input_ids, "loss_mask": loss_mask})
    return encoded


def _with_one_eos(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return [*ids, cast(int, tokenizer.eos_token_id)]


def _leading_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return [BOS] if the tokenizer begins plain text with it, else []."""
    ids: list[int] = tokenizer("")["input_ids"][:1]
    return ids if ids == [tokenizer.bos_token_id] else []


def _cut(full: Demonstration, max_length: int) -> Demonstration | None:
    mask = full["loss_mask"][:max_length]
    if not any(mask[1:]):  # nothing comes before the first token to predict it from
        return None
    return {"input_ids": full["input_ids"][:max_length], "loss_mask": mask}


def _pair(row: Row, chosen: Demonstration, rejected: Demonstration) -> Preference:
    return {
        "chosen_ids": chosen["input_ids"],
        "rejected_ids": rejected["input_ids"],
        "chosen_mask": chosen["loss_mask"],
        "rejected_mask": rejected["loss_mask"],
        "margin": row.get("margin", 0.0),
    }


class _Tally:
    """Counts what a limit costs, to say it once."""

    def __init__(self, what: str, max_length: int) -> None:
        self.what, self.max_length = what, max_length
        self.rows = self.cut = self.dropped = self.longest = 0

    def count(self, length: int, *, dropped: bool) -> None:
        self.rows += 1
        self.dropped += dropped
        self.cut += length > self.max_length and not dropped
        self.longest = max(self.longest, length)

    def warning(self) -> str:
        """What to say, or "". Raises ValueError if nothing is left."""
        if self.rows and self.dropped == self.rows:
            raise ValueError(
                f"all {self.rows} {self.what} are over the limit of {self.max_length} tokens (the"
                f" longest row has {self.longest}): raise max_length or give shorter rows"
            )
        if not self.dropped and not self.cut:
            return ""
        return (
            f"limit of {self.max_length} tokens, longest row {self.longest}: {self.dropped} of"
            f" {self.rows} rows dropped, {self.cut} cut at the right"
        )


def _map(
    rows: Dataset,
    encode: Callable[[list[Row]], list[Row]],
    tally: _Tally,
    tokenizer: PreTrainedTokenizerBase,
    columns: Mapping[str, Any],
) -> Dataset:
    """Apply `encode` to batches of rows, or take what it gave before; warn of what it cost."""
    features = Features(columns)

    def encode_columns(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        names = list(batch)
        encoded = encode(
            [dict(zip(names, cells, strict=True)) for cells in zip(*batch.values(), strict=True)]
        )
        return {name: [row[name] for row in encoded] for name in features}

    def build(folder: Path) -> tuple[Dataset, str]:
        encoded = map_rows(rows, encode_columns, features, folder, batch_size=_ROWS_AT_ONCE)
        return encoded, tally.warning()

    parts = {
        "rows": content_digest(rows),
        "tokenizer": tokenizer_digest(tokenizer),
        "max_length": tally.max_length,
        "columns": str(features),
    }
    return cached(f"encoded-{tally.what}", parts, build)
