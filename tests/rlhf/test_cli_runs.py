"""Whole runs from the command line, the single steps, and talking to the result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from rlhf.cli.main import main
from tests.rlhf.tiny import error_line, write_config, write_rows


@contextmanager
def on_one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a whole run."""
    folder = tmp_path_factory.mktemp("run")
    options = ["--config", str(write_config(folder)), "--output_dir", str(folder / "out")]
    with on_one_thread():
        assert main(["run", *options]) == 0
    return folder / "out"


def test_a_whole_run(finished: Path) -> None:
    for model in ("sft", "reward", "actor", "critic"):
        assert (finished / model / "model.safetensors").is_file()
        assert (finished / model / "tokenizer.json").is_file()
    left = {path.name for path in finished.iterdir()}
    metrics = {f"{step}.jsonl" for step in ("sft", "reward", "ppo")}
    report = {"report.md", "report.json", "report.png"}
    models = {"sft", "reward", "actor", "critic"}
    assert left == {*models, "checkpoints", "tensorboard", *metrics, *report}
    ended = {path.name for path in (finished / "checkpoints").iterdir()}
    assert ended == {"sft.json", "reward.json", "ppo.json"}
    assert len((finished / "ppo.jsonl").read_text().splitlines()) == 2
    record = json.loads((finished / "report.json").read_text())
    assert 0 <= record["after"]["quality"] <= 1
    assert abs(record["before"]["kl"]) < 1e-4
    assert len(record["samples"]) == 2
    assert record["throughput"]["engine"] > 0
    assert set(record["seconds"]) == {"SFT", "reward model", "PPO", "evaluation"}


def test_chat_with_the_result(finished: Path, capfd: pytest.CaptureFixture[str]) -> None:
    chat = ["chat", str(finished / "actor"), "--max_new_tokens", "5", "--prompt", "count to 6"]

    def answer(*options: str) -> str:
        assert main([*chat, *options]) == 0
        return capfd.readouterr().out

    capfd.readouterr()
    first = answer()
    assert first.endswith("\n")
    assert answer() == first  # the seed is fixed
    assert answer("--seed", "1") != first


def weights(folder: Path) -> dict[str, bytes]:
    files = folder.glob("*/model.safetensors")
    return {path.parent.name: path.read_bytes() for path in files}


def test_the_seed_decides_a_run(rlhf, finished: Path, tmp_path: Path) -> None:
    """Bit for bit, from the tokenizer to the trained actor; and each step can be run alone."""
    quick = ["--evaluation.compare_hf_generate", "false"]
    with on_one_thread():
        for step in ("sft", "reward", "ppo"):
            code, stderr = rlhf(step, *quick)
            assert code == 0, stderr
            assert (tmp_path / "out" / f"{step}.md").is_file()
        assert weights(tmp_path / "out") == weights(finished)
        assert rlhf("sft", "--seed", "1")[0] == 0
    assert weights(tmp_path / "out")["sft"] != weights(finished)["sft"]


def test_deepspeed_chats_data_options(rlhf, tmp_path: Path) -> None:
    """One set of pairs for every step, divided; of two datasets."""
    names = []
    for letter in "ab":
        pairs = [
            {"prompt": f"\n\nHuman: {letter}{i}\n\nAssistant:", "chosen": " yes", "rejected": " no"}
            for i in range(60)
        ]
        names.append(write_rows(tmp_path / f"{letter}.jsonl", pairs))
    options = ["--data_path", *names, "--data_split", "2,4,4", "--sft.data.heldout_fraction", "0.2"]
    code, stderr = rlhf("sft", *options)
    assert code == 0, stderr
    assert len((tmp_path / "out" / "sft.jsonl").read_text().splitlines()) == 2  # 16 of some 20 rows
    assert "three shares" in error_line(rlhf("sft", "--data_path", *names, "--data_split", "2,4"))


def test_dpo_in_place_of_two_steps(rlhf, tmp_path: Path) -> None:
    assert "run `rlhf sft`" in error_line(rlhf("dpo"))
    assert rlhf("sft")[0] == 0
    code, stderr = rlhf("dpo")
    assert code == 0, stderr
    out = tmp_path / "out"
    assert (out / "dpo" / "config.json").exists()
    report = json.loads((out / "dpo.json").read_text())
    assert report["dpo"]["eval/loss"] > 0
    assert report["before"]["kl"] == pytest.approx(0.0, abs=1e-3)
    assert "true quality, SFT -> DPO" in (out / "dpo.md").read_text()
    assert (out / "dpo.png").stat().st_size > 1000
