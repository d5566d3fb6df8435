"""Tokenizers: train a small one, load one, and make sure that it can pad, stop and chat."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import cast

from jinja2 import Environment, TemplateError, TemplateSyntaxError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf.data.cache import tokenizer_digest
from rlhf.data.names import first_line, looks_local, missing_path

PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"
ROLES = ("system", "user", "assistant")

# The space before a text belongs to the text, so that its first word is the token it always is.
ROLE_TOKEN_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<' + message['role'] + '> ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

# The dialogue of Anthropic's hh-rlhf (and DeepSpeed-Chat): for tokenizers that bring no template.
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '\\n\\nHuman: ' + message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ '\\n\\nAssistant: ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('unknown role ' + message['role']) }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)

# Tokens that published models keep for padding or keep free, best first.
_SPARE_TOKENS = (
    "<pad>",
    "[PAD]",
    "<|pad|>",
    "<|padding|>",
    "<|finetune_right_pad_id|>",
    "<|reserved_special_token_0|>",
    "<|endoftext|>",
)


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, chat_template: str | None = None
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that encodes any text without loss.

    Special tokens: <pad>, <bos> (put before plain text), <eos>, and the role tokens <system>,
    <user>, <assistant> as far as the chat template uses them. Raises ValueError if `vocab_size`
    has no room for the 256 bytes and the special tokens.
    """
    template = chat_template or ROLE_TOKEN_TEMPLATE
    role_tokens = [
        f"<{role}>" for role in ROLES if chat_template is None or f"<{role}>" in template
    ]
    special_tokens = [PAD, BOS, EOS, *role_tokens]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + len(special_tokens):
        raise ValueError(
            f"vocab_size {vocab_size} is too small: {len(alphabet)} bytes and"
            f" {len(special_tokens)} special tokens need {len(alphabet) + len(special_tokens)}"
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        (" " + text for text in texts),  # a first word is a word like any other
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=special_tokens,
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, bpe.token_to_id(BOS))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=role_tokens,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = template
    return tokenizer


def load_tokenizer(
    name: str | Path, *, chat_template: str | None = None, eos_token: str | None = None
) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a local folder or the hub and prepare it (see `prepare_tokenizer`).

    Args:
        chat_template: a Jinja template, or a file that holds one, in place of the tokenizer's.
        eos_token: the token of its vocabulary that ends a response, in place of the tokenizer's.

    Raises FileNotFoundError for a path that is not there, and ValueError where there is no
    tokenizer, or the template or EOS cannot be used.
    """
    hint = "Give a folder written by save_pretrained, or a hub name"
    path = Path(name).expanduser()
    if not path.is_dir() and looks_local(str(name)):
        raise missing_path(str(name), hint)
    try:
        source = str(path if path.is_dir() else name)
        tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(source))
    except (OSError, ValueError) as error:
        tried = "this folder" if path.is_dir() else "the Hugging Face hub and its local cache"
        hint += " that this machine can reach or has cached"
        if inner := sorted(file.parent.name for file in path.glob("*/config.json")):
            hint = f"Give the model in it that you mean: {', '.join(inner)}"
        raise ValueError(
            f"no tokenizer {str(name)!r}; tried {tried}: {first_line(error)}. {hint}"
        ) from error
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise ValueError(f"eos_token {eos_token!r} is not in the vocabulary of {str(name)!r}")
        tokenizer.eos_token = eos_token
    if chat_template is not None:
        tokenizer.chat_template = read_chat_template(chat_template)
    prepare_tokenizer(tokenizer)
    return tokenizer


def read_chat_template(template: str) -> str:
    """A Jinja template, itself or from the file of that name. Raises ValueError if it is none."""
    text = template
    if "{" not in template:
        path = Path(template).expanduser()
        if not path.is_file():
            raise missing_path(template, "Give a Jinja template, or a file that holds one")
        text = path.read_text()
    try:
        Environment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except TemplateSyntaxError as error:
        raise ValueError(f"chat_template: line {error.lineno}: {error}") from error
    if "{" not in text:
        raise ValueError(f"chat_template: {template!r} holds no Jinja template")
    return text


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError for a template that leaves out what is said: Jinja writes "" for a name that
    it does not know."""
    said = {"user": "a question", "assistant": "an answer"}
    dialogue = [{"role": role, "content": content} for role, content in said.items()]
    try:
        text = str(tokenizer.apply_chat_template(dialogue, tokenize=False))
    except (TemplateError, ValueError):  # the error comes, with its row, where rows are rendered
        return
    for role, content in said.items():
        if content not in text:
            raise ValueError(
                f"chat_template leaves out what the {role} says: it has to write each message's"
                " 'role' and 'content'"
            )


def other_tokenizer(
    name: str | Path, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model; None if it gives the same ids as this one."""
    own = load_tokenizer(name)
    return None if tokenizer_digest(own) == tokenizer_digest(tokenizer) else own


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase) -> int:
    """Give a tokenizer, in place, the padding token and chat template that it lacks.

    Padding must differ from EOS. A tokenizer whose pad token is missing or is its EOS gets a spare
    special token of its own vocabulary, else its unknown token, else a new "<pad>". What it has
    already stays untouched.

    Returns the number of tokens added, 0 or 1. If the vocabulary outgrew the model's embedding,
    the model needs `resize_token_embeddings(len(tokenizer))`.

    Raises ValueError if the tokenizer has no EOS: without one no response ends.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no EOS token, so no response would ever end: give the token of its"
            " vocabulary that ends a turn, with model.eos_token before SFT, or as eos_token in the"
            " tokenizer_config.json of its folder"
        )
    if tokenizer.chat_template is None:
        tokenizer.chat_template = DEFAULT_CHAT_TEMPLATE
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return 0
    taken = {tokenizer.eos_token, tokenizer.bos_token}
    vocabulary = tokenizer.get_vocab()
    for token in (*_SPARE_TOKENS, tokenizer.unk_token):
        if token in vocabulary and token not in taken:
            tokenizer.pad_token = token
            return 0
    return int(tokenizer.add_special_tokens({"pad_token": PAD}))
