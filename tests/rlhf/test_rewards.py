"""Reward functions: found by name, called as each response ends, checked in what they return."""

from __future__ import annotations

import math
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from hybrid_engine import HybridEngine, SamplingParams
from rlhf.data import decode_completion
from rlhf.models import load_critic, save_model
from rlhf.rewards import FunctionError, Reward, load_function
from rlhf.rewards.gsm8k import exact_answer

PROMPTS = [[1, 50, 60], [1, 70], [1, 90, 91]]
TEXTS: list[Any] = [[{"role": "user", "content": f"question {i}"}] for i in range(3)]
RESPONSES = [[101, 2], [102, 103, 2], [104]]


def score(reward: Reward, tokenizer: Any, columns: dict[str, list[Any]] | None = None) -> Any:
    pending = reward.start(TEXTS, columns or {}, tokenizer)
    for i in (2, 0, 1):  # in whatever order they end
        pending.submit(i, RESPONSES[i])
    return pending.scores(None, device=torch.device("cpu"))


def by_number(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    return [float(p[-1]["content"].split()[-1]) for p in prompts]


def lengths(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    return [float(len(c[-1]["content"])) for c in completions]


@pytest.mark.parametrize("overlap", [True, False], ids=["each", "batch"])
def test_functions_are_given_prompts_completions_and_columns(tokenizer, overlap: bool) -> None:
    seen: dict[str, tuple[Any, Any]] = {}

    def function(prompts, completions, **columns):
        for p, c, answer in zip(prompts, completions, columns["answer"], strict=True):
            seen[answer] = (p, c)
        return [float(columns["n"][i]) for i in range(len(prompts))]

    reward = Reward([function], overlap=overlap)
    columns = {"answer": ["a", "b", "c"], "n": [1, 2, 3]}
    assert score(reward, tokenizer, columns).total.tolist() == [1.0, 2.0, 3.0]
    for i, name in enumerate("abc"):
        text = decode_completion(RESPONSES[i], tokenizer).strip()
        assert seen[name] == (TEXTS[i], [{"role": "assistant", "content": text}])


def test_a_function_without_keywords_gets_the_columns_that_it_names(tokenizer) -> None:
    def function(prompts, completions, n):
        return n

    found = score(Reward([function]), tokenizer, {"n": [1, 2, 3], "other": [0, 0, 0]})
    assert found.total.tolist() == [1.0, 2.0, 3.0]


def test_several_are_added_with_weights(tokenizer) -> None:
    reward = Reward([by_number, lengths], weights=[10.0, 0.5])
    found = score(reward, tokenizer)
    texts = [decode_completion(r, tokenizer).strip() for r in RESPONSES]
    expected = [10.0 * i + 0.5 * len(text) for i, text in enumerate(texts)]
    assert found.total.tolist() == pytest.approx(expected)
    assert found.parts["by_number"].tolist() == [0.0, 1.0, 2.0]


def test_a_model_and_functions_are_added(tokenizer) -> None:
    def model(ids, prompt_lengths, lengths):
        return lengths.float()

    reward = Reward([by_number], weights=[2.0], model=model, model_weight=0.1)
    pending = reward.start(TEXTS, {}, tokenizer)
    for i, response in enumerate(RESPONSES):
        pending.submit(i, response)
    totals = torch.tensor([5, 6, 7])
    of_model = reward.model_scores(torch.zeros(3, 7).long(), totals, totals, micro_batch_size=2)
    found = pending.scores(of_model, device=torch.device("cpu"))
    torch.testing.assert_close(found.total, torch.tensor([0.5, 2.6, 4.7]))


def test_none_skips_and_counts_as_nothing_in_a_sum(tokenizer) -> None:
    def picky(prompts, completions, **columns):
        return [None if p[-1]["content"].endswith("1") else 5.0 for p in prompts]

    alone = score(Reward([picky]), tokenizer).total
    assert alone[[0, 2]].tolist() == [5.0, 5.0]
    assert math.isnan(alone[1])
    together = score(Reward([picky, by_number]), tokenizer).total
    assert together.tolist() == [5.0, 1.0, 7.0]


def test_two_functions_of_one_name_stay_apart(tokenizer) -> None:
    parts = score(Reward([by_number, by_number], weights=[1.0, -1.0]), tokenizer).parts
    assert len(parts) == 2


def test_names_of_parts_never_meet(tokenizer) -> None:
    names = ["f", "f", "f_2", "reward_model", "f"]
    functions = []
    for value, name in enumerate(names):

        def function(prompts, completions, value=value):
            return [float(value)] * len(prompts)

        function.__name__ = name
        functions.append(function)
    reward = Reward(functions, model=lambda ids, prompt_lengths, lengths: lengths.float())
    pending = reward.start(TEXTS, {}, tokenizer)
    for i, response in enumerate(RESPONSES):
        pending.submit(i, response)
    found = pending.scores(torch.full((3,), 100.0), device=torch.device("cpu"))
    assert [part[0].item() for part in found.parts.values()] == [0.0, 1.0, 2.0, 3.0, 4.0, 100.0]
    assert found.total.tolist() == [110.0] * 3


def test_a_response_up_to_the_last_position_is_scored(scorer, tokenizer) -> None:
    """Cut off there, it leaves no room for the EOS that the reward model scores at."""
    positions = 12
    model = scorer("opt", max_position_embeddings=positions)
    reward = Reward(model=model)
    ids = torch.arange(6, 6 + positions).unsqueeze(0)
    lengths = torch.tensor([positions])
    pending = reward.start(["x"], {}, tokenizer)
    found = pending.model_scores(ids, torch.tensor([4]), lengths, micro_batch_size=1)
    ids[0, -1] = tokenizer.eos_token_id
    torch.testing.assert_close(
        found, reward.model_scores(ids, torch.tensor([4]), lengths, micro_batch_size=1)
    )


def raises(prompts, completions, **columns):
    raise KeyError("gold")


def leaves(prompts, completions, **columns):
    raise SystemExit(3)


def needs_more(prompts, completions, gold):
    return [1.0] * len(completions)


BAD = {
    "raises": (raises, r"raises raised KeyError: 'gold'"),
    "leaves": (leaves, r"leaves raised SystemExit: 3"),
    "needs-more": (needs_more, r"missing a required argument: 'gold'.*other columns by name: "),
    "short": (lambda prompts, completions, **_: [], r"returned 0 values for 1 completions"),
    "nan": (lambda prompts, completions, **_: [math.nan], r"returned nan for"),
    "infinite": (lambda prompts, completions, **_: [math.inf], r"returned inf for"),
    "text": (lambda prompts, completions, **_: ["good"], r"returned 'good': a number"),
    "number": (lambda prompts, completions, **_: 1.0, r"returned float: return a list"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_function_is_named(tokenizer, name: str) -> None:
    function, message = BAD[name]
    with pytest.raises(FunctionError, match=message) as caught:
        score(Reward([by_number, function]), tokenizer)
    assert function.__name__ in str(caught.value)


def test_a_function_starts_while_others_decode(causal_lm, tokenizer) -> None:
    """The first responses are scored before the last has ended."""
    model = causal_lm()
    model.generation_config.eos_token_id = [2, *range(100, 130)]
    ended: list[int] = []
    scored = threading.Event()

    def function(prompts, completions, **columns):
        scored.set()
        return [1.0] * len(prompts)

    pending = Reward([function]).start([[1]] * 6, {}, tokenizer)

    def on_finish(index: int, response: list[int]) -> None:
        pending.submit(index, response)
        assert scored.wait(timeout=20)  # the engine stands here, inside generate
        ended.append(index)

    prompts = [[1, 40 + i] for i in range(6)]
    HybridEngine(model).generate(prompts, SamplingParams(max_new_tokens=12), on_finish=on_finish)
    assert sorted(ended) == list(range(6))
    assert pending.scores(None, device=torch.device("cpu")).total.tolist() == [1.0] * 6


def test_a_reward_model_gone_wrong_is_said() -> None:
    reward = Reward(model=lambda *args: torch.tensor([1.0, math.nan]))
    two = torch.ones(2).long()
    with pytest.raises(ValueError, match="reward model's scores are not finite"):
        reward.model_scores(torch.ones(2, 3).long(), two, two, micro_batch_size=2)


def test_a_reward_needs_something() -> None:
    with pytest.raises(ValueError, match="a model or a function"):
        Reward()
    with pytest.raises(ValueError, match="2 weights for 1 reward functions"):
        Reward([by_number], weights=[1.0, 2.0])


def test_functions_by_name(tmp_path: Path) -> None:
    assert load_function("math:sqrt", option="x") is math.sqrt
    (tmp_path / "mine.py").write_text("def f(prompts, completions):\n    return [3.0]\n")
    assert load_function(f"{tmp_path}/mine.py:f", option="x")([""], [""]) == [3.0]


def test_a_file_may_have_dataclasses(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Score:\n    value: float\n"
        "def f(prompts, completions):\n    return [Score(3.0).value]\n"
    )
    assert load_function(f"{tmp_path}/mine.py:f", option="x")([""], [""]) == [3.0]


@pytest.mark.parametrize("line", ["x = undefined_thing", "{}['k']", "1 +"])
def test_a_file_that_fails_is_said(tmp_path: Path, line: str) -> None:
    (tmp_path / "mine.py").write_text(line)
    with pytest.raises(ValueError, match=r"option '.*mine.py:f' is no function.*Error: "):
        load_function(f"{tmp_path}/mine.py:f", option="option")


@pytest.mark.parametrize(
    "path", ["nowhere:f", "rlhf.data.synthetic:nothing", "math", "", "math:pi", "missing.py:f"]
)
def test_a_function_that_is_not_there(path: str) -> None:
    with pytest.raises(ValueError, match=r"ppo\.reward_functions .* is no function"):
        load_function(path, option="ppo.reward_functions")


GSM8K = {
    "marked": ("so 3 + 4 = 7\n#### 7", 1.0),
    "last number": ("There are 12 apples, of which 7", 1.0),
    "decimal": ("#### 7.00", 1.0),
    "dollars": ("It costs $7.", 1.0),
    "first after the mark": ("#### 7 apples in 2 bags", 1.0),
    "wrong": ("#### 8", 0.0),
    "negative": ("#### -7", 0.0),
    "no number": ("seven", 0.0),
    "empty": ("", 0.0),
    "mark and nothing": ("7 ####", 0.0),
}


@pytest.mark.parametrize("name", GSM8K)
def test_gsm8k_exact_answer(name: str) -> None:
    completion, expected = GSM8K[name]
    answer = ["3 + 4 = <<3+4=7>>7\n#### 7"]
    assert exact_answer(["q"], [completion], answer=answer) == [expected]
    message = [{"role": "assistant", "content": completion}]
    assert exact_answer(["q"], [message], answer=answer) == [expected]


def test_gsm8k_thousands_and_missing_references() -> None:
    """Rows of another dataset in a mix have no answer; one may be a number and no text."""
    answers = ["#### 1250", "unknown", None, 5]
    found = exact_answer(["q"] * 4, ["#### 1,250", "5", "5", "5"], answer=answers)
    assert found == [1.0, None, None, 1.0]


def test_a_critic_without_a_reward_model_starts_at_zero(causal_lm, scorer, tokenizer, tmp_path):
    """From a language model the score head is zeros; a reward model's own head is kept."""
    ids = torch.tensor([[1, 50, 60]])
    save_model(causal_lm(), tokenizer, tmp_path / "actor")
    save_model(scorer(seed=2), tokenizer, tmp_path / "reward")
    fresh = load_critic(str(tmp_path / "actor"), tokenizer, dtype=torch.float32)
    assert (fresh(input_ids=ids).logits == 0).all()
    trained = load_critic(str(tmp_path / "reward"), tokenizer, dtype=torch.float32)
    assert torch.equal(trained.score.weight, scorer(seed=2).score.weight)
