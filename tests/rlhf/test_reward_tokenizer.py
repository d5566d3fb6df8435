"""A reward model with another tokenizer and chat template than the actor's, and its last EOS."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import PreTrainedTokenizerFast

from rlhf.config import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    PPOConfig,
    RewardConfig,
    RunConfig,
)
from rlhf.data import encode_preferences, load_rows, train_tokenizer
from rlhf.models import build_causal_lm, save_model
from rlhf.pipeline import Pipeline
from rlhf.rewards import Reward
from tests.rlhf.tiny import LLAMA

TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
PROMPTS = [[{"role": "user", "content": "count from 3 to 6"}]] * 2


@pytest.fixture(scope="module")
def other() -> PreTrainedTokenizerFast:
    texts = ["reverse the words tea cat", "of course: 3 4 5 6."] * 3
    return train_tokenizer(texts, vocab_size=300, chat_template=TEMPLATE)


@pytest.fixture
def reader(other) -> Any:
    """A reward model that reads the other tokenizer's ids."""
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    config: Any = build_causal_lm(LLAMA, other, dtype=torch.float32).config
    config.num_labels = 1
    model = AutoModelForSequenceClassification.from_config(config)
    torch.nn.init.normal_(model.score.weight)
    return model.eval()


def last_token_score(model: Any, text: str, tokenizer: PreTrainedTokenizerFast) -> float:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        hidden = model.model(input_ids=torch.tensor([ids])).last_hidden_state
        return float(model.score(hidden[0, -1]))


def scores(reward: Reward, tokenizer, prompts: list, responses: list[list[int]]) -> list[float]:
    """As the trainer asks for them."""
    pending = reward.start(prompts, {}, tokenizer)
    prompt_ids = [
        tokenizer.apply_chat_template(p, add_generation_prompt=True, return_dict=False)
        for p in prompts
    ]
    sequences = [[*p, *r] for p, r in zip(prompt_ids, responses, strict=True)]
    lengths = torch.tensor([len(s) for s in sequences])
    ids = torch.zeros(len(sequences), int(lengths.max()), dtype=torch.int64)
    for i, sequence in enumerate(sequences):
        ids[i, : len(sequence)] = torch.tensor(sequence)
        pending.submit(i, responses[i])
    prompt_lengths = torch.tensor([len(p) for p in prompt_ids])
    found = pending.model_scores(ids, prompt_lengths, lengths, micro_batch_size=1)
    return pending.scores(found, device=ids.device).total.tolist()


def answer(tokenizer, text: str, *, ended: bool) -> list[int]:
    ids = tokenizer(" " + text, add_special_tokens=False)["input_ids"]
    return [*ids, tokenizer.eos_token_id] if ended else ids


def test_it_reads_the_text_in_its_own_words(tokenizer, other, reader) -> None:
    reward = Reward(model=reader, model_tokenizer=other)
    texts = ["sure: 3 4 5 6.", "no"]
    responses = [answer(tokenizer, text, ended=True) for text in texts]
    found = scores(reward, tokenizer, PROMPTS, responses)
    expected = [
        last_token_score(reader, f"<bos>[user] count from 3 to 6[assistant] {text}<eos>", other)
        for text in texts
    ]
    assert found == pytest.approx(expected, rel=1e-5)


def test_both_sides_of_training_are_encoded_alike(tokenizer, other, reader) -> None:
    """What scoring reads is what a pair of training holds, EOS included."""
    row = {
        "prompt": PROMPTS[0],
        "chosen": [{"role": "assistant", "content": "sure: 3."}],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    from datasets import Dataset

    pair = encode_preferences(Dataset.from_list([row]), other, max_length=200)[0]
    seen: list[list[int]] = []
    pending = Reward(model=reader, model_tokenizer=other).start(PROMPTS[:1], {}, tokenizer)
    pending.submit(0, answer(tokenizer, "sure: 3.", ended=True))
    seen = pending._encoded_anew(other, reader)
    assert seen == [pair["chosen_ids"]]


@pytest.mark.parametrize("own", [True, False], ids=["another-tokenizer", "the-actors"])
def test_a_cut_response_is_scored_at_an_eos_too(
    scorer, tokenizer, other, reader, own: bool
) -> None:
    """Where the model has learned to score; the missing EOS costs its penalty, not a wild score."""
    reward = Reward(model=reader, model_tokenizer=other) if own else Reward(model=scorer())
    ended, cut = (answer(tokenizer, "sure: 3 4", ended=ended) for ended in (True, False))
    found = scores(reward, tokenizer, PROMPTS, [ended, cut])
    assert found[1] == pytest.approx(found[0], rel=1e-5)


def test_what_is_too_long_for_it_loses_its_beginning(tokenizer, other, reader) -> None:
    reader.config.max_position_embeddings = 12
    pending = Reward(model=reader, model_tokenizer=other).start(PROMPTS[:1], {}, tokenizer)
    pending.submit(0, answer(tokenizer, "sure: 3 4 5 6.", ended=True))
    (ids,) = pending._encoded_anew(other, reader)
    assert len(ids) == 12
    assert ids[-1] == other.eos_token_id


def test_ppo_with_a_reward_model_of_another_base(tokenizer, other, tmp_path: Path) -> None:
    """Trained by `reward` from a base with its own tokenizer, and used by `ppo`."""
    for name, its in (("sft", tokenizer), ("base", other)):
        model = build_causal_lm(LLAMA, its, dtype=torch.float32)
        save_model(model, its, tmp_path / name)
    data = DataConfig(rows=16, heldout_rows=8, max_length=120)
    config = RunConfig(
        output_dir=str(tmp_path),
        model=ModelConfig(path=str(tmp_path / "sft")),
        reward=RewardConfig(data=data, model_path=str(tmp_path / "base"), batch_size=8),
        ppo=PPOConfig(data=data, iterations=2, batch_size=4, max_new_tokens=6),
        evaluation=EvaluationConfig(prompts=4, compare_hf_generate=False),
    )
    pipeline = Pipeline(config, Console(file=io.StringIO()))
    pipeline.reward()
    pipeline.ppo()
    assert pipeline.report.after is not None
    settings = {n: json.loads((tmp_path / n / "config.json").read_text()) for n in
                ("reward", "critic", "actor")}  # fmt: skip
    assert settings["reward"]["vocab_size"] == len(other)
    assert settings["critic"]["vocab_size"] == settings["actor"]["vocab_size"] == len(tokenizer)
    bad = RunConfig(
        output_dir=str(tmp_path / "another_critic"),
        ppo=PPOConfig(
            data=data,
            actor_path=str(tmp_path / "sft"),
            reward_path=str(tmp_path / "reward"),
            critic_path=str(tmp_path / "reward"),
            iterations=1,
        ),
    )
    with pytest.raises(ValueError, match=r"critic .* has another tokenizer than the actor"):
        Pipeline(bad, Console(file=io.StringIO())).ppo()


def test_the_synthetic_pairs_end_alike_in_any_tokenizer(tokenizer, other) -> None:
    rows = load_rows("synthetic", purpose="preferences", max_rows=30)
    for its in (tokenizer, other):
        for pair in encode_preferences(rows, its, max_length=200):
            for side in ("chosen_ids", "rejected_ids"):
                assert pair[side][-1] == its.eos_token_id
                assert its.eos_token_id not in pair[side][:-1]
