"""`rlhf eval`: figures against loops over the answers, and the report that it leaves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch

from rlhf.cli.main import main
from rlhf.config import ComparisonConfig, DataConfig
from rlhf.data import load_rows
from rlhf.evaluation import compare, win_rate
from rlhf.models import save_model

SCALED = "def length(prompts, completions):\n    return [len(c) / 10 for c in completions]\n"


@pytest.fixture
def folders(causal_lm, tokenizer, tmp_path: Path) -> list[str]:
    """Two random models that end at different lengths."""
    for seed in (0, 1):
        model = causal_lm(seed=seed)
        model.generation_config.eos_token_id = [2, *range(100, 110 + 60 * seed)]
        save_model(model, tokenizer, tmp_path / f"model{seed}")
    (tmp_path / "judge.py").write_text(SCALED)
    return [str(tmp_path / "model0"), str(tmp_path / "model1"), f"{tmp_path}/judge.py:length"]


def configuration(folders: list[str], **options: Any) -> ComparisonConfig:
    options = {
        "policy": folders[0], "against": folders[1], "reward_functions": [folders[2]],
        "data": DataConfig(name="arithmetic", heldout_rows=20, max_length=60),
        "prompts": 12, "max_new_tokens": 16, "metric": "rlhf.data.arithmetic:exact_match",
        **options,
    }  # fmt: skip
    return ComparisonConfig(**options)


def test_comparison_is_the_loop(folders) -> None:
    found = compare(configuration(folders))
    assert len(found.prompts) == 12
    heldout = load_rows("arithmetic", purpose="prompts", split="test", max_rows=20)
    assert found.prompts == [prompt.strip() for prompt in heldout["prompt"][:12]]
    for policy in (found.a, found.b):
        expected = [len(text) / 10 for text in policy.completions]
        assert policy.scores == pytest.approx(expected, abs=1e-5)
        assert policy.score == pytest.approx(sum(expected) / 12, abs=1e-5)
    pairs = list(zip(found.a.scores, found.b.scores, strict=True))
    wins = sum(x > y for x, y in pairs)
    ties = sum(x == y for x, y in pairs)
    rate = found.win_rate
    assert (rate.wins, rate.ties, rate.losses) == (wins, ties, 12 - wins - ties)
    assert abs(found.b.kl) < 1e-4  # the reference is B
    assert found.a.kl > 0.1
    assert found.a.length > found.b.length


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0], ids=lambda t: f"T{t:g}")
def test_a_policy_ties_with_itself(folders, temperature: float) -> None:
    found = compare(configuration([folders[0]] * 2 + folders[2:], temperature=temperature))
    assert found.win_rate.rate == 0.5
    assert found.win_rate.ties == 12
    assert abs(found.a.kl) < 1e-4


def test_one_policy_alone_has_no_win_rate(folders) -> None:
    found = compare(configuration(folders, against=None, reference=folders[1]))
    assert found.b is None
    assert found.win_rate is None
    assert found.a.kl > 0.1


def test_win_rate_by_hand() -> None:
    """Two wins, a tie and a loss are 2.5 of 4; a pair with a skipped answer is left out."""
    rate = win_rate([1.0, 2.0, 0.0, 3.0, math.nan], [0.0, 1.0, 0.0, 4.0, 1.0])
    assert (rate.wins, rate.ties, rate.losses) == (2, 1, 1)
    assert rate.rate == 0.625
    # Wilson: centre (0.625 + 1.96^2 / 8) / (1 + 1.96^2 / 4), half-width by the same formula.
    scale = 1 + 1.96**2 / 4
    centre = (0.625 + 1.96**2 / 8) / scale
    half = 1.96 * math.sqrt(0.625 * 0.375 / 4 + 1.96**2 / 64) / scale
    assert rate.interval == pytest.approx((centre - half, centre + half))


def test_interval_narrows_with_prompts_and_stays_a_share() -> None:
    few, many = win_rate([1.0] * 4, [0.0] * 4), win_rate([1.0] * 400, [0.0] * 400)
    assert 0.4 < few.interval[0] < many.interval[0] < 1.0
    assert few.interval[1] == many.interval[1] == 1.0


def test_the_command_writes_report_record_and_picture(folders, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    code = main([
        "eval", "--policy", folders[0], "--against", folders[1],
        "--reward_functions", f"[{folders[2]}]", "--data.name", "arithmetic", "--prompts", "8",
        "--max_new_tokens", "8", "--output_dir", str(out), "--samples", "3",
    ])  # fmt: skip
    assert code == 0
    assert {path.name for path in out.iterdir()} == {"eval.md", "eval.json", "eval.png"}
    record = json.loads((out / "eval.json").read_text())
    text, printed = (out / "eval.md").read_text(), capsys.readouterr().out
    figure = f"{record['win_rate']['rate']:.3f} ("
    assert figure in text
    assert figure in printed
    for i in range(3):
        assert record["prompts"][i] in text
        for name in ("a", "b"):
            assert record[name]["completions"][i].strip() in text
    pixels = matplotlib.image.imread(out / "eval.png")[..., :3]
    coloured = (pixels.max(-1) - pixels.min(-1)) > 0.2
    assert np.ptp(np.flatnonzero(coloured.any(0))) > 0.8 * pixels.shape[1]  # in all three panels


def test_nothing_judges() -> None:
    with pytest.raises(ValueError, match="give reward_path or reward_functions"):
        ComparisonConfig(policy="x")


def test_other_tokenizers_are_refused(folders, causal_lm, tmp_path: Path) -> None:
    from rlhf.data import train_tokenizer

    other = train_tokenizer(["quite another text, with words"], vocab_size=290)
    model = causal_lm(vocab_size=290)
    save_model(model, other, tmp_path / "other")
    with pytest.raises(ValueError, match="different tokenizers"):
        compare(configuration(folders, against=str(tmp_path / "other")))


def test_judged_by_a_reward_model_too(folders, scorer, tokenizer, tmp_path: Path) -> None:
    save_model(scorer(seed=2), tokenizer, tmp_path / "judge")
    found = compare(configuration(folders, reward_path=str(tmp_path / "judge"), prompts=4))
    alone = compare(configuration(folders, prompts=4))
    difference = torch.tensor(found.a.scores) - torch.tensor(alone.a.scores)
    assert (difference.abs() > 1e-4).any()


def test_judged_by_a_reward_model_with_words_of_its_own(folders, scorer, tmp_path: Path) -> None:
    """As in PPO: it reads the text, encoded anew."""
    from rlhf.data import encode_answers, train_tokenizer
    from rlhf.models import sequence_scores

    other = train_tokenizer(["quite another text, with words"], vocab_size=290)
    judge = scorer(vocab_size=290, seed=2)
    save_model(judge, other, tmp_path / "judge")
    found = compare(
        configuration(
            folders, against=None, reward_functions=[], reward_path=str(tmp_path / "judge")
        )
    )
    heldout = load_rows("arithmetic", purpose="prompts", split="test", max_rows=20)
    for prompt, answer, score in zip(
        heldout["prompt"], found.a.completions, found.a.scores, strict=False
    ):
        (ids,) = encode_answers([{"prompt": prompt, "completion": answer}], other)
        with torch.no_grad():
            expected = sequence_scores(judge, torch.tensor([ids]), torch.tensor([len(ids)]))
        assert score == pytest.approx(float(expected), abs=1e-4)


def test_all_answers_skipped(folders, tmp_path: Path) -> None:
    (tmp_path / "none.py").write_text("def none(prompts, completions): return [None]")
    with pytest.raises(ValueError, match=r"skipped all 12 answers of .*model0"):
        compare(configuration(folders, reward_functions=[f"{tmp_path}/none.py:none"]))
