"""The commands on real data: a small Llama from random weights, a tokenizer trained on the data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.cli.main import main

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
CONFIG = ROOT / "examples" / "small_from_scratch.yaml"
SMALL = ["--model.vocab_size=600", "--sft.data.rows=160", "--reward.data.rows=160"]
SMALL += ["--sft.data.heldout_rows=40", "--reward.data.heldout_rows=60"]

pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason=f"the data folder {DATA} is absent")


def _history(folder: Path, step: str) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / f"{step}.jsonl").read_text().splitlines()]


def _fall(folder: Path, step: str) -> float:
    """By how much the mean loss of the last quarter is under that of the first."""
    losses = [record["loss"] for record in _history(folder, step)]
    quarter = max(1, len(losses) // 4)
    return sum(losses[:quarter]) / quarter - sum(losses[-quarter:]) / quarter


def _run(step: str, folder: Path, **names: Path) -> dict:
    data = [f"--{name}.data.name={path}" for name, path in names.items()]
    assert main([step, f"--config={CONFIG}", f"--output_dir={folder}", *SMALL, *data]) == 0
    return json.loads((folder / f"{step}.json").read_text())


def test_sft_and_reward_model_on_dialogue_pairs(tmp_path: Path) -> None:
    pairs = DATA / "hh_rlhf"
    report = _run("sft", tmp_path, sft=pairs)
    assert _fall(tmp_path, "sft") > 0.3
    assert report["sft"]["eval/loss"] < _history(tmp_path, "sft")[0]["loss"]

    report = _run("reward", tmp_path, sft=pairs, reward=pairs)
    assert _fall(tmp_path, "reward") > 0.02
    assert 0 <= report["reward"]["eval/accuracy"] <= 1


def test_sft_on_questions_and_answers(tmp_path: Path) -> None:
    report = _run("sft", tmp_path, sft=DATA / "gsm8k")
    assert _fall(tmp_path, "sft") > 0.3
    assert report["sft"]["eval/loss"] < _history(tmp_path, "sft")[0]["loss"]


def test_dpo_on_dialogue_pairs_after_sft_on_a_mix(tmp_path: Path) -> None:
    """Two datasets of different formats in one SFT, divided from the pairs that DPO learns."""
    mix = json.dumps([
        {"name": str(DATA / "hh_rlhf"), "weight": 3}, {"name": str(DATA / "gsm8k"), "weight": 1},
    ])  # fmt: skip
    common = [f"--config={CONFIG}", f"--output_dir={tmp_path}", *SMALL, "--data_split", "1,1,1"]
    assert main(["sft", *common, "--sft.data.mix", mix, "--sft.epochs=1"]) == 0
    assert _fall(tmp_path, "sft") > 0.3
    options = ["--dpo.optimizer.learning_rate=1e-3", "--dpo.batch_size=8"]
    options += ["--dpo.data.rows=48", "--dpo.data.heldout_rows=16"]
    assert main(["dpo", *common, f"--dpo.data.name={DATA / 'hh_rlhf'}", *options]) == 0
    history = _history(tmp_path, "dpo")
    assert history[0]["loss"] == pytest.approx(0.693, abs=0.001)
    assert history[-1]["rewards/margins"] > 0
    assert history[-1]["rewards/accuracies"] > 0.5
    report = json.loads((tmp_path / "dpo.json").read_text())
    assert 0 < report["dpo"]["eval/rewards/accuracies"] <= 1
