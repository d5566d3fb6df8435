"""What the report measures, against loops, and the files that it leaves."""

from __future__ import annotations

import json
import resource
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from datasets import Dataset
from rich.console import Console

from hybrid_engine import HybridEngine, SamplingParams
from rlhf.data import decode_completion, encode_prompts, load_rows
from rlhf.engines import PlainEngine
from rlhf.evaluation import (
    PolicyEvaluation,
    RunReport,
    Throughput,
    compare_with_hf_generate,
    evaluate_policy,
    write_report,
)
from rlhf.models import sequence_scores
from rlhf.rewards import Reward

STOPS = [2, *range(100, 130)]


@pytest.fixture
def prompts(tokenizer) -> Dataset:
    rows = load_rows("synthetic", purpose="prompts", split="test", max_rows=7)
    return encode_prompts(rows, tokenizer, max_length=100)


@pytest.mark.parametrize("micro", [64, 3], ids=lambda m: f"micro{m}")
def test_policy_evaluation_is_the_loop(causal_lm, scorer, tokenizer, prompts, micro: int) -> None:
    actor, reference, reward = causal_lm(), causal_lm(seed=1), scorer(seed=2)
    actor.generation_config.eos_token_id = STOPS
    seen: dict[str, Any] = {}

    def metric(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        seen.update(prompts=prompts, completions=completions, columns=columns)
        return [float(i) for i in range(len(prompts))]

    found = evaluate_policy(
        PlainEngine(actor), PlainEngine(reference), Reward(model=reward), tokenizer, prompts,
        max_new_tokens=10, metric=metric, micro_batch_size=micro, seed=5,
    )  # fmt: skip
    ids = list(prompts["input_ids"])
    rollout = HybridEngine(actor).generate(ids, SamplingParams(max_new_tokens=10, seed=5))
    scores, kl = [], []
    with torch.no_grad():
        for i, prompt in enumerate(ids):
            response = rollout.response(i)
            whole = torch.tensor([[*prompt, *response]])
            end = [] if response[-1] == tokenizer.eos_token_id else [tokenizer.eos_token_id]
            read = torch.tensor([[*prompt, *response, *end]])  # a score is read at an EOS
            scores.append(float(sequence_scores(reward, read, torch.tensor([read.shape[1]]))))
            logprobs = [
                model(input_ids=whole).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
                for model in (actor, reference)
            ]
            chosen = torch.tensor(response)[:, None]
            kl.append(float((logprobs[0] - logprobs[1]).gather(1, chosen).sum()))
    assert found.score == pytest.approx(sum(scores) / 7, rel=1e-4)
    assert found.kl == pytest.approx(sum(kl) / 7, rel=1e-4)
    assert found.length == float(rollout.lengths.float().mean())
    ended = sum(rollout.response(i)[-1] in STOPS for i in range(7))
    assert found.ended == ended / 7
    assert found.quality == 3.0
    assert found.scores == pytest.approx(scores, rel=1e-4)
    assert found.lengths == rollout.lengths.tolist()
    assert found.completions == [
        decode_completion(rollout.response(i), tokenizer) for i in range(7)
    ]
    assert seen["prompts"] == list(prompts["prompt"])
    assert len(seen["completions"]) == 7


def test_a_policy_has_no_kl_from_itself(causal_lm, scorer, tokenizer, prompts) -> None:
    actor = causal_lm()
    found = evaluate_policy(
        PlainEngine(actor),
        PlainEngine(actor),
        Reward(model=scorer()),
        tokenizer,
        prompts,
        max_new_tokens=10,
        metric=None,
    )
    assert abs(found.kl) < 1e-4
    assert found.quality is None


def test_evaluation_leaves_the_model_as_it_was(causal_lm, scorer, tokenizer, prompts) -> None:
    actor = causal_lm()
    before = {name: tensor.clone() for name, tensor in actor.state_dict().items()}
    evaluate_policy(
        PlainEngine(actor),
        PlainEngine(actor),
        Reward(model=scorer()),
        tokenizer,
        prompts,
        max_new_tokens=4,
        metric=None,
    )
    for name, tensor in actor.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert len({p.untyped_storage().data_ptr() for p in actor.parameters()}) == len(
        list(actor.parameters())
    )


def test_throughput_counts_real_tokens(causal_lm, tokenizer, prompts) -> None:
    model = causal_lm()
    ids = list(prompts["input_ids"])
    found = compare_with_hf_generate(model, tokenizer, ids, max_new_tokens=6)
    assert found.prompts == 7
    assert found.engine > 0
    assert found.hf_generate > 0
    assert Throughput(engine=300.0, hf_generate=100.0, prompts=1).ratio == 3.0


def evaluation(score: float, quality: float | None) -> PolicyEvaluation:
    return PolicyEvaluation(
        score=score, quality=quality, kl=2.5, length=11.0, ended=0.5, completions=["a", "b"],
        scores=[score, score], lengths=[10, 12],
    )  # fmt: skip


def full_report() -> RunReport:
    history = [{"step": i, "loss": 5.0 / i, "accuracy": 1 - 0.5 / i} for i in range(1, 20)]
    ppo = [
        {
            "step": i, "objective/scores": 0.1 * i, "objective/kl": 0.2 * i,
            "policy/entropy_avg": 3.0 / i, "loss/value_avg": 1.0 / i,
        }
        for i in range(1, 20)
    ]  # fmt: skip
    return RunReport(
        parameters=1_500_000,
        seconds={"SFT": 10.0, "PPO": 20.5},
        sft={"eval/loss": 1.234, "eval/perplexity": 3.4},
        reward={"eval/accuracy": 0.91, "eval/loss": 0.3, "eval/margin": 1.75},
        calibration=[(0.6, 0.5, 10), (0.9, 0.95, 30)],
        before=evaluation(0.0, 0.55),
        after=evaluation(1.5, 0.8),
        throughput=Throughput(engine=12_000.0, hf_generate=3_000.0, prompts=8),
        samples=[("count | from 3", "sure: 3", "of course: 3 4.")],
        histories={"sft": history, "reward": history, "ppo": ppo},
    )


def picture(path: Path) -> np.ndarray:
    return matplotlib.image.imread(path)[..., :3]


def test_report_files_have_the_figures(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as file:
        write_report(full_report(), tmp_path, Console(file=file, width=120))
    text = (tmp_path / "report.md").read_text()
    printed = (tmp_path / "out").read_text()
    for figure in (
        "1.50 M", "1.234", "0.910", "0.00 -> 1.50", "0.550 -> 0.800 (+0.250)", "2.50", "12,000",
        "3,000", "4.0x", "30.5", "1.750", "0.062",  # calibration error: (10 * 0.1 + 30 * 0.05) / 40
    ):  # fmt: skip
        assert figure in text, figure
        assert figure in printed, figure
    assert "PPO: of course: 3 4." in text
    assert "(report.png)" in text
    record = json.loads((tmp_path / "report.json").read_text())
    assert record["after"]["quality"] == 0.8
    assert record["throughput"]["ratio"] == 4.0
    assert record["seconds"] == {"SFT": 10.0, "PPO": 20.5}
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"out", "report.md", "report.json", "report.png"}


def test_the_curves_are_a_picture_with_lines(tmp_path: Path, console: Console) -> None:
    write_report(full_report(), tmp_path, console)
    pixels = picture(tmp_path / "report.png")
    assert pixels.shape[0] > 300
    assert pixels.shape[1] > 800
    coloured = (pixels.max(-1) - pixels.min(-1)) > 0.3  # lines; axes and text are grey
    assert coloured.mean() > 1e-4
    rows, columns = (np.flatnonzero(coloured.any(axis)) for axis in (1, 0))
    assert np.ptp(rows) > 0.5 * pixels.shape[0]  # in all the panels
    assert np.ptp(columns) > 0.7 * pixels.shape[1]


def test_other_curves_make_another_picture(tmp_path: Path, console: Console) -> None:
    report = full_report()
    write_report(report, tmp_path, console)
    first = picture(tmp_path / "report.png")
    report.histories["sft"] = [{"step": i, "loss": float(i)} for i in range(20)]
    write_report(report, tmp_path, console)
    assert not np.array_equal(picture(tmp_path / "report.png"), first)


def test_calibration_has_a_panel(tmp_path: Path, console: Console) -> None:
    pictures = []
    for points in ([], [(0.6, 0.5, 10), (0.9, 0.95, 30)], [(0.6, 0.9, 10), (0.9, 0.95, 30)]):
        report = RunReport(calibration=points)
        write_report(report, tmp_path, console)
        pictures.append(picture(tmp_path / "report.png"))
    assert not np.array_equal(pictures[1], pictures[2])
    coloured = pictures[1].max(-1) - pictures[1].min(-1) > 0.3
    assert coloured.any()
    assert not (pictures[0].max(-1) - pictures[0].min(-1) > 0.3).any()


def test_a_single_step_has_a_report_of_its_own(tmp_path: Path, console: Console) -> None:
    report = RunReport(
        sft={"eval/loss": 2.0}, histories={"sft": [{"step": 1, "loss": 3.0}]}, seconds={"SFT": 1.0}
    )
    write_report(report, tmp_path, console, name="sft")
    assert {path.name for path in tmp_path.iterdir()} == {"sft.md", "sft.json", "sft.png"}
    text = (tmp_path / "sft.md").read_text()
    assert "2.000" in text
    assert "reward" not in text
    assert json.loads((tmp_path / "sft.json").read_text())["before"] is None


def test_a_full_disk_leaves_no_half_report(tmp_path: Path, console: Console) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            write_report(full_report(), tmp_path, console)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
