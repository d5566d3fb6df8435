"""A tokenizer for models without text: one word a token."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedTokenizerFast


def word_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Token i is the word t<i>; pad, BOS and EOS are 0, 1 and 2."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    special: dict[str, Any] = {"pad_token": "t0", "bos_token": "t1", "eos_token": "t2"}
    core = Tokenizer(WordLevel({f"t{i}": i for i in range(vocab)}, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="t0", **special)
