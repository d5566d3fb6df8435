import logging

import pytest
from datasets import Dataset
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from rlhf.data import (
    DEFAULT_CHAT_TEMPLATE,
    decode_completion,
    encode_demonstration,
    encode_demonstrations,
    encode_preference,
    encode_preferences,
    encode_prompt,
    encode_prompts,
    load_rows,
    train_tokenizer,
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<eos>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
WITHOUT_EOS = (
    "{{ bos_token }}{% for m in messages %}{{ '### ' + m.role + ': ' + m.content + '\n\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '### assistant: ' }}{% endif %}"
)
FORGETS_REASONING = (
    "{% for m in messages %}{{ '<' + m.role + '>' }}"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}"
    "{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
OPENS_THINKING = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content }}"
    "{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>{% endif %}"
)
TEMPLATES = {
    "roles": None,
    "hh": DEFAULT_CHAT_TEMPLATE,
    "chatml": CHATML,
    "without-eos": WITHOUT_EOS,
    "forgets-reasoning": FORGETS_REASONING,
    "opens-thinking": OPENS_THINKING,
}
PROMPT = [
    {"role": "user", "content": "the cat and the dog"},
    {"role": "assistant", "content": "sat on the mat"},
    {"role": "user", "content": "and the log?"},
]
COMPLETION = [{"role": "assistant", "content": "sat on the log, too"}]
OTHER = [{"role": "assistant", "content": "no"}]


def tokenizer_with(template) -> PreTrainedTokenizerFast:
    texts = ["the cat and the dog sat on the mat", "### assistant: two\n\n### user: two"]
    return train_tokenizer(texts, vocab_size=330, chat_template=TEMPLATES[template])


@pytest.fixture(params=TEMPLATES)
def any_tokenizer(request) -> PreTrainedTokenizerFast:
    return tokenizer_with(request.param)


def trained_runs(encoded):
    """Return the ids of each stretch that is trained."""
    runs, previous = [], 0
    for token, trained in zip(encoded["input_ids"], encoded["loss_mask"], strict=True):
        if trained and not previous:
            runs.append([])
        if trained:
            runs[-1].append(token)
        previous = trained
    return runs


def test_by_hand(tokenizer):
    row = {
        "prompt": [{"role": "user", "content": "the dog"}],
        "completion": [{"role": "assistant", "content": "the cat"}],
    }
    encoded = encode_demonstration(row, tokenizer, max_length=50)
    tokens = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
    assert tokens == ["<bos>", "<user>", "Ġthe", "Ġdog", "<assistant>", "Ġthe", "Ġcat", "<eos>"]
    assert encoded["loss_mask"] == [0, 0, 0, 0, 0, 1, 1, 1]


def test_prompt_is_a_true_prefix_and_the_rest_is_trained(any_tokenizer):
    row = {"prompt": PROMPT, "completion": COMPLETION}
    prompt_ids = encode_prompt(row, any_tokenizer, max_length=500)
    encoded = encode_demonstration(row, any_tokenizer, max_length=500)
    n = len(prompt_ids)
    assert encoded["input_ids"][:n] == prompt_ids
    assert encoded["loss_mask"] == [0] * n + [1] * (len(encoded["input_ids"]) - n)
    completion_ids = encoded["input_ids"][n:]
    assert completion_ids[-1] == any_tokenizer.eos_token_id
    assert completion_ids.count(any_tokenizer.eos_token_id) == 1
    assert decode_completion(completion_ids, any_tokenizer).strip() == "sat on the log, too"
    assert prompt_ids.count(any_tokenizer.bos_token_id) == 1
    assert prompt_ids[0] == any_tokenizer.bos_token_id


@pytest.mark.parametrize("template", ["roles", "hh", "chatml", "forgets-reasoning"])
def test_text_is_that_of_the_template(template):
    """Where a template ends each reply with EOS and keeps what was said, the text is its own."""
    tokenizer = tokenizer_with(template)
    expected = tokenizer.apply_chat_template(PROMPT, tokenize=False, add_generation_prompt=True)
    ids = encode_prompt({"prompt": PROMPT}, tokenizer, max_length=500)
    assert tokenizer.decode(ids).removeprefix("<bos>") == expected.removeprefix("<bos>")


def test_messages_train_every_assistant_turn(any_tokenizer):
    encoded = encode_demonstration(
        {"messages": [*PROMPT, *COMPLETION]}, any_tokenizer, max_length=500
    )
    runs = trained_runs(encoded)
    said = [decode_completion(run, any_tokenizer).strip() for run in runs]
    assert said == ["sat on the mat", "sat on the log, too"]
    for run in runs:
        assert run[-1] == any_tokenizer.eos_token_id
        assert run.count(any_tokenizer.eos_token_id) == 1


def test_a_rewritten_history_becomes_context():
    tokenizer = train_tokenizer(["the cat"], vocab_size=300, chat_template=FORGETS_REASONING)
    thought = {"role": "assistant", "content": "hm</think>the cat"}
    messages = [PROMPT[0], thought, PROMPT[2], thought]
    encoded = encode_demonstration({"messages": messages}, tokenizer, max_length=500)
    said = [decode_completion(run, tokenizer) for run in trained_runs(encoded)]
    assert said == ["hm</think>the cat"]
    assert tokenizer.decode(encoded["input_ids"]).count("hm</think>") == 1


def test_plain_strings_stay_verbatim(tokenizer):
    row = {"prompt": "the  cat sat", "completion": " on the mat\n"}
    encoded = encode_demonstration(row, tokenizer, max_length=50)
    assert tokenizer.decode(encoded["input_ids"]) == "<bos>the  cat sat on the mat\n<eos>"
    assert decode_completion(trained_runs(encoded)[0], tokenizer) == " on the mat\n"
    prompt_ids = encode_prompt(row, tokenizer, max_length=50)
    assert encoded["input_ids"][: len(prompt_ids)] == prompt_ids


def test_border_between_prompt_and_completion_never_merges(tokenizer):
    encoded = encode_demonstration(
        {"prompt": "the c", "completion": "at"}, tokenizer, max_length=50
    )
    merged = tokenizer.encode("the cat")
    assert encoded["input_ids"][:-1] != merged
    assert tokenizer.decode(encoded["input_ids"][1:-1]) == "the cat"


def test_text_trains_everything_but_bos(tokenizer):
    encoded = encode_demonstration({"text": "the cat"}, tokenizer, max_length=50)
    assert encoded["loss_mask"] == [0] + [1] * (len(encoded["input_ids"]) - 1)
    assert encoded["input_ids"][-1] == tokenizer.eos_token_id


def test_eos_in_the_data_is_not_doubled(tokenizer):
    row = {"prompt": PROMPT[:1], "completion": [{"role": "assistant", "content": "cat<eos>"}]}
    ids = encode_demonstration(row, tokenizer, max_length=50)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1


def test_preference_shares_its_prompt_and_ends_alike(any_tokenizer):
    row = {"prompt": PROMPT, "chosen": COMPLETION, "rejected": OTHER}
    pair = encode_preference(row, any_tokenizer, max_length=500)
    prompt_ids = encode_prompt(row, any_tokenizer, max_length=500)
    for side, completion in (("chosen", COMPLETION), ("rejected", OTHER)):
        ids = pair[f"{side}_ids"]
        row = {"prompt": PROMPT, "completion": completion}
        assert ids == encode_demonstration(row, any_tokenizer, max_length=500)["input_ids"]
        assert ids[: len(prompt_ids)] == prompt_ids
        assert ids[-1] == any_tokenizer.eos_token_id


def test_decode_completion_stops_at_the_first_eos(tokenizer):
    cat, eos, pad = tokenizer.encode(" cat")[-1], tokenizer.eos_token_id, tokenizer.pad_token_id
    assert decode_completion([cat, eos, cat, eos], tokenizer) == " cat"
    assert decode_completion([cat, cat], tokenizer) == " cat cat"
    assert decode_completion([cat, pad], tokenizer) == " cat"
    assert decode_completion([], tokenizer) == ""


def test_limits_of_single_rows(tokenizer):
    row = {"prompt": "the cat", "completion": " sat on the mat"}
    n = len(encode_demonstration(row, tokenizer, max_length=50)["input_ids"])
    prompt_length = len(encode_prompt(row, tokenizer, max_length=50))
    cut = encode_demonstration(row, tokenizer, max_length=n - 1)
    assert len(cut["input_ids"]) == len(cut["loss_mask"]) == n - 1
    assert tokenizer.eos_token_id not in cut["input_ids"]
    assert encode_demonstration(row, tokenizer, max_length=prompt_length) is None
    assert encode_prompt(row, tokenizer, max_length=prompt_length - 1) is None
    pair = {"prompt": "the cat", "chosen": " sat on the mat", "rejected": " no"}
    assert encode_preference(pair, tokenizer, max_length=n) is not None
    assert encode_preference(pair, tokenizer, max_length=n - 1) is None


def rows_of_lengths(*lengths):
    return Dataset.from_list(
        [{"prompt": "a" * n, "completion": "b" * 4, "source": f"row {n}"} for n in lengths]
    )


def test_bulk_equals_row_by_row(tokenizer):
    rows = load_rows("synthetic", purpose="demonstrations", max_rows=300)
    encoded = encode_demonstrations(rows, tokenizer, max_length=40)
    one_by_one = [encode_demonstration(row, tokenizer, max_length=40) for row in rows]
    assert list(encoded) == [row for row in one_by_one if row is not None]
    pairs = load_rows("synthetic", purpose="preferences", max_rows=300)
    encoded = encode_preferences(pairs, tokenizer, max_length=60)
    one_by_one = [encode_preference(row, tokenizer, max_length=60) for row in pairs]
    assert list(encoded) == [row for row in one_by_one if row is not None]
    assert 0 < len(encoded) < 300


def test_what_is_cut_or_dropped_is_counted_and_said_once(tokenizer, caplog):
    rows = rows_of_lengths(3, 8, 30)  # 8, 13 and 35 tokens with BOS, completion and EOS
    with caplog.at_level(logging.WARNING):
        encoded = encode_demonstrations(rows, tokenizer, max_length=12)
    assert [len(ids) for ids in encoded["input_ids"]] == [
        len(encode_demonstration(row, tokenizer, max_length=12)["input_ids"])
        for row in rows.select(range(2))
    ]
    assert [record.getMessage() for record in caplog.records] == [
        "limit of 12 tokens, longest row 36: 1 of 3 rows dropped, 1 cut at the right"
    ]


def test_nothing_is_said_when_all_fits(tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        encode_demonstrations(rows_of_lengths(3, 8), tokenizer, max_length=100)
    assert not caplog.records


def test_prompts_keep_their_columns(tokenizer):
    rows = rows_of_lengths(3, 8, 30)
    encoded = encode_prompts(rows, tokenizer, max_length=12)
    assert encoded["source"] == ["row 3", "row 8"]
    assert encoded["prompt"] == ["aaa", "a" * 8]
    assert encoded[0]["input_ids"] == encode_prompt(rows[0], tokenizer, max_length=12)


@pytest.mark.parametrize("encode", [encode_demonstrations, encode_prompts])
def test_all_over_the_limit_is_an_error(tokenizer, encode):
    with pytest.raises(ValueError, match="all 2 prompts are over the limit of 4 tokens") as error:
        encode(rows_of_lengths(20, 30), tokenizer, max_length=4)
    assert "longest row has 3" in str(error.value)


def test_first_rows_all_dropped_changes_nothing_for_the_others(tokenizer):
    rows = rows_of_lengths(*[30] * 600, 3)
    assert len(encode_prompts(rows, tokenizer, max_length=10)) == 1


def test_template_that_rejects_a_dialogue_says_so():
    template = "{{ raise_exception('roles must alternate') }}"
    tokenizer = train_tokenizer(["a"], vocab_size=300, chat_template=template)
    with pytest.raises(ValueError, match="the roles user: roles must alternate"):
        encode_prompt({"prompt": PROMPT[:1]}, tokenizer, max_length=50)


def test_half_a_dialogue_is_refused(tokenizer):
    with pytest.raises(ValueError, match="both be strings or both be message lists"):
        encode_demonstration({"prompt": "a", "completion": COMPLETION}, tokenizer, max_length=9)


def test_real_rows(real_data, tokenizer):
    rows = load_rows(str(real_data / "hh_rlhf"), purpose="preferences", split="test")
    encoded = encode_preferences(rows, tokenizer, max_length=2000)
    assert len(encoded) == len(rows)
    for row, pair in zip(rows, encoded, strict=True):
        prompt_ids = encode_prompt(row, tokenizer, max_length=2000)
        assert pair["chosen_ids"][: len(prompt_ids)] == prompt_ids
        said = decode_completion(pair["chosen_ids"][len(prompt_ids) :], tokenizer)
        assert said.strip() == row["chosen"][0]["content"]


def test_the_first_token_alone_teaches_nothing():
    """Nothing comes before it; without BOS it is a token that could be trained."""
    tokenizer = train_tokenizer(["a b"], vocab_size=300)
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    assert encode_demonstration({"text": "a b"}, tokenizer, max_length=1) is None
    two = encode_demonstration({"text": "a b"}, tokenizer, max_length=2)
    assert two is not None
    assert two["loss_mask"] == [1, 1]
