"""Data: from a name to batches of token ids.

    rows = load_rows("synthetic", purpose="demonstrations", split="train")     # canonical rows
    tokenizer = load_tokenizer("path/or/hub-name")                             # or train_tokenizer
    encoded = encode_demonstrations(rows, tokenizer, max_length=512)           # ids and loss masks
    batches = RowBatches(len(encoded), 16, seed=0)                             # has a state_dict
    for indices in batches:
        input_ids, lengths = collate_right(encoded[indices]["input_ids"], tokenizer.pad_token_id)

`sources` finds the rows, `formats` brings them into one form, `encoding` makes ids and masks of
them, `blend` one dataset of several, `batching` tensors; `cache` keeps on disk what was made.
`synthetic` is an instruction set whose answers have a checkable quality.
"""

from rlhf.data.batching import (
    RowBatches,
    collate_right,
    length_mask,
)
from rlhf.data.blend import DataBlend, blend
from rlhf.data.encoding import (
    Demonstration,
    Preference,
    decode_completion,
    encode_answers,
    encode_demonstration,
    encode_demonstrations,
    encode_preference,
    encode_preferences,
    encode_prompt,
    encode_prompts,
)
from rlhf.data.formats import (
    Dialogue,
    Message,
    Purpose,
    Row,
    detect_format,
    parse_dialogue,
    texts_of,
    to_completion,
    to_demonstration,
    to_preference,
    to_prompt,
)
from rlhf.data.sources import load_rows
from rlhf.data.split import Share, Split, shares_of
from rlhf.data.synthetic import answer_quality, quality
from rlhf.data.tokenizer import (
    DEFAULT_CHAT_TEMPLATE,
    check_chat_template,
    load_tokenizer,
    other_tokenizer,
    prepare_tokenizer,
    read_chat_template,
    train_tokenizer,
)

__all__ = [
    "DEFAULT_CHAT_TEMPLATE",
    "DataBlend",
    "Demonstration",
    "Dialogue",
    "Message",
    "Preference",
    "Purpose",
    "Row",
    "RowBatches",
    "Share",
    "Split",
    "answer_quality",
    "blend",
    "check_chat_template",
    "collate_right",
    "decode_completion",
    "detect_format",
    "encode_answers",
    "encode_demonstration",
    "encode_demonstrations",
    "encode_preference",
    "encode_preferences",
    "encode_prompt",
    "encode_prompts",
    "length_mask",
    "load_rows",
    "load_tokenizer",
    "other_tokenizer",
    "parse_dialogue",
    "prepare_tokenizer",
    "quality",
    "read_chat_template",
    "shares_of",
    "texts_of",
    "to_completion",
    "to_demonstration",
    "to_preference",
    "to_prompt",
    "train_tokenizer",
]
