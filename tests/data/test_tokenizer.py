import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf.data import DEFAULT_CHAT_TEMPLATE, load_tokenizer, prepare_tokenizer, train_tokenizer

DIALOGUE = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": "hello"},
    {"role": "user", "content": "who?"},
]


def tokenizer_with(vocabulary, **special):
    model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, "a"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=model, **special)


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_special_tokens(tokenizer):
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == (
        "<pad>",
        "<bos>",
        "<eos>",
    )
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    assert tokenizer("cat").input_ids[0] == tokenizer.bos_token_id
    assert len(tokenizer) <= 320
    for role in ("system", "user", "assistant"):
        assert len(tokenizer.encode(f"<{role}>", add_special_tokens=False)) == 1


def test_template_with_role_tokens(tokenizer):
    text = tokenizer.apply_chat_template(DIALOGUE, tokenize=False, add_generation_prompt=True)
    assert text == ("<bos><system> be brief<user> hi<assistant> hello<eos><user> who?<assistant>")


def test_own_template_brings_only_its_own_role_tokens():
    trained = train_tokenizer(["a b"], vocab_size=262, chat_template="<user>{{ messages }}")
    assert "<user>" in trained.get_vocab()
    assert "<assistant>" not in trained.get_vocab()


def test_frequent_words_become_one_token():
    texts = ["repeat the word cat", "cat and dog"] * 50
    trained = train_tokenizer(texts, vocab_size=400)
    for word in (" repeat", " word", " cat", " dog"):
        assert len(trained.encode(word, add_special_tokens=False)) == 1


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size 100 is too small: 256 bytes and 6 special"):
        train_tokenizer(["a"], vocab_size=100)


def test_saved_and_loaded_it_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    text = "a cat, ünïcode, \n\n two  spaces"
    assert loaded(text).input_ids == tokenizer(text).input_ids
    assert loaded.decode(loaded.encode(text, add_special_tokens=False)) == text
    assert loaded.chat_template == tokenizer.chat_template
    assert (loaded.pad_token_id, loaded.eos_token_id) == (
        tokenizer.pad_token_id,
        tokenizer.eos_token_id,
    )


def test_default_template_is_hh_rlhf():
    bare = tokenizer_with(["a", "</s>", "<pad>"], eos_token="</s>", pad_token="<pad>")
    assert prepare_tokenizer(bare) == 0
    assert bare.chat_template == DEFAULT_CHAT_TEMPLATE
    assert bare.apply_chat_template(DIALOGUE, tokenize=False, add_generation_prompt=True) == (
        "be brief\n\nHuman: hi\n\nAssistant: hello</s>\n\nHuman: who?\n\nAssistant:"
    )


@pytest.mark.parametrize(
    ("vocabulary", "special", "pad", "added"),
    [
        (["a", "<e>", "<p>"], {"eos_token": "<e>", "pad_token": "<p>"}, "<p>", 0),
        (["a", "<e>", "<|padding|>"], {"eos_token": "<e>"}, "<|padding|>", 0),
        (["a", "<e>", "<unk>"], {"eos_token": "<e>", "unk_token": "<unk>"}, "<unk>", 0),
        (["a", "<e>", "<pad>"], {"eos_token": "<e>", "pad_token": "<e>"}, "<pad>", 0),
        (["a", "<|endoftext|>"], {"eos_token": "<|endoftext|>"}, "<pad>", 1),
        (
            ["a", "</s>", "<unk>"],
            {"eos_token": "</s>", "bos_token": "</s>", "unk_token": "</s>"},
            "<pad>",
            1,
        ),
    ],
    ids=["has-one", "reserved", "unk", "pad-is-eos", "gpt2", "all-eos"],
)
def test_padding_is_found_or_added(vocabulary, special, pad, added):
    prepared = tokenizer_with(vocabulary, **special)
    assert prepare_tokenizer(prepared) == added
    assert prepared.pad_token == pad
    assert prepared.pad_token_id != prepared.eos_token_id
    assert len(prepared) == len(vocabulary) + added


def test_prepared_tokenizer_is_left_alone(tokenizer):
    before = (tokenizer.chat_template, tokenizer.pad_token, len(tokenizer))
    assert prepare_tokenizer(tokenizer) == 0
    assert (tokenizer.chat_template, tokenizer.pad_token, len(tokenizer)) == before


def test_without_eos_it_is_refused():
    with pytest.raises(ValueError, match=r"no EOS token, so no response .* with model\.eos_token"):
        prepare_tokenizer(tokenizer_with(["a"]))


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder.*nowhere"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="tried this folder"):
        load_tokenizer(tmp_path)


def test_unreachable_hub_is_one_clear_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="no tokenizer 'no/such'; tried the Hugging Face hub"):
        load_tokenizer("no/such")


TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"


@pytest.mark.parametrize("given", ["text", "file"])
def test_another_template(tokenizer, tmp_path, given):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    template = TEMPLATE if given == "text" else str(tmp_path / "chat.jinja")
    loaded = load_tokenizer(tmp_path, chat_template=template)
    rendered = loaded.apply_chat_template(DIALOGUE[:2], tokenize=False)
    assert rendered == f"[system]{DIALOGUE[0]['content']}[user]{DIALOGUE[1]['content']}"
    loaded.save_pretrained(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").chat_template == TEMPLATE


@pytest.mark.parametrize(
    ("template", "error", "message"),
    [
        ("{% for m in %}", ValueError, "chat_template: line 1"),
        ("nowhere.jinja", FileNotFoundError, r"no such file or folder: 'nowhere\.jinja'"),
    ],
    ids=["syntax", "missing"],
)
def test_a_bad_template_is_refused(tokenizer, tmp_path, template, error, message):
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(error, match=message):
        load_tokenizer(tmp_path, chat_template=template)


def test_another_end(tmp_path):
    tokenizer_with(["a", "<end>", "<pad>"], pad_token="<pad>").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no EOS token"):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path, eos_token="<end>").eos_token_id == 1
    with pytest.raises(ValueError, match="eos_token 'stop' is not in the vocabulary"):
        load_tokenizer(tmp_path, eos_token="stop")
