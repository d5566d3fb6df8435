"""`rlhf plan`: tables, the record, the study, and errors in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf.cli.main import main


def test_all_steps_and_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "plan.json"
    arguments = "plan --model opt-13b --critic opt-350m --gpus 8 --gpu A100-80 --step all"
    assert main([*arguments.split(), "--output", str(record), "--price", "3"]) == 0
    shown = capsys.readouterr().out
    for text in ("sft with", "reward with", "KV cache", "update actor", "an iteration x 258"):
        assert text in shown
    best = json.loads(record.read_text())[0]
    assert best["obstacle"] is None
    assert best["dollars"] == pytest.approx(best["total_hours"] * 8 * 3)
    assert sum(best["seconds"].values()) * best["iterations"] / 3600 == pytest.approx(
        best["total_hours"]
    )


def test_what_does_not_fit_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "opt-66b", "--gpus", "1", "--gpu", "A100-80"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "nothing fits" in shown
    assert "needs" in shown


def test_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "study"
    arguments = ["plan", "--model", "opt-1.3b,opt-13b", "--critic", "opt-350m", "--gpus", "8"]
    assert main([*arguments, "--scaling", str(folder)]) == 0
    studies = json.loads((folder / "scaling.json").read_text())
    assert [study["model"] for study in studies] == ["opt-1.3b", "opt-13b"]
    assert studies[0]["strong"][-1]["gpus"] == 1024
    assert (folder / "scaling.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--gpu B900", "no GPU 'B900' in the table"),
        ("--model nobody/knows", "no model 'nobody/knows'"),
        ("--gpus 0", "gpus must be at least 1"),
        ("--system other", "no system 'other'"),
    ],
)
def test_errors_are_one_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", *arguments.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
