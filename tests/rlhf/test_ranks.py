"""The command on several processes: they start, one speaks, and a failure ends them all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.cli.main import main
from rlhf.cli.ranks import VARIABLES, without_local_rank
from tests.rlhf.tiny import TINY, write_config

REWARDS = '''
"""Reward functions that go wrong in a process of their own."""
import os, signal, time

def fails_on_rank_1(prompts, completions, **columns):
    if os.environ["RANK"] == "1":
        raise ValueError("no idea")
    return [1.0 for _ in completions]

def counts(prompts, completions, **columns):
    """Kills the rank that KILL names once it has been called for so many responses."""
    rank, _, after = os.environ.get("KILL", "").partition(":")
    counts.calls += len(completions)
    if rank == os.environ.get("RANK") and counts.calls > int(after):
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(c[-1]["content"] if isinstance(c, list) else c)) for c in completions]

counts.calls = 0
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a configuration, reward functions, and the SFT model that PPO starts from."""
    folder = tmp_path_factory.mktemp("ranks")
    config = write_config(
        folder,
        ppo={**TINY["ppo"], "iterations": 4},
        evaluation={"prompts": 4, "samples": 2, "compare_hf_generate": False},
        checkpoint={"every_iterations": 1},
    )
    (folder / "rewards.py").write_text(REWARDS)
    assert main(["sft", "--config", str(config), "--output_dir", str(folder)]) == 0
    return folder


def rlhf(folder: Path, out: str, reward: str, *arguments: str, **environment: str):
    """PPO on two processes."""
    command = [
        sys.executable, "-m", "rlhf.cli.main", "ppo", "--config", str(folder / "tiny.yaml"),
        "--output_dir", str(folder / out), "--ppo.actor_path", str(folder / "sft"),
        "--ppo.reward_functions", f'["{folder / "rewards.py"}:{reward}"]', "--nproc", "2",
        *arguments,
    ]  # fmt: skip
    settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=settings, timeout=150
    )


def test_a_failing_rank_ends_all_with_its_message(folder: Path) -> None:
    run = rlhf(folder, "fails", "fails_on_rank_1")
    assert run.returncode == 2
    errors = [line for line in run.stderr.splitlines() if "rror" in line]
    assert errors == ["rlhf ppo: error: reward function fails_on_rank_1 raised ValueError: no idea"]


def metrics(path: Path) -> list[dict[str, float]]:
    return [
        {n: v for n, v in json.loads(line).items() if not n.startswith(("timing_s/", "perf/"))}
        for line in path.read_text().splitlines()
    ]


@pytest.mark.slow
@pytest.mark.parametrize("rank", ["0", "1"], ids=lambda r: f"kill-rank-{r}")
def test_killed_in_a_ppo_step_and_resumed(folder: Path, rank: str) -> None:
    """The metrics are those of a run that nobody killed, every digit."""
    options = ("--zero_stage", "3") if rank == "1" else ("--zero_stage", "2")
    whole, killed = f"whole-{rank}", f"killed-{rank}"
    assert rlhf(folder, whole, "counts", *options).returncode == 0
    run = rlhf(folder, killed, "counts", *options, KILL=f"{rank}:5")  # 2 a step: in the third
    assert run.returncode == 128 + signal.SIGKILL
    errors = [line for line in run.stderr.splitlines() if "rror" in line]
    assert errors == [f"rlhf: error: rank {rank} was killed by SIGKILL"]
    left = {path.name for path in (folder / killed / "checkpoints" / "ppo").iterdir()}
    assert left == {"step-00000001", "step-00000002"}
    assert not (folder / killed / "actor").exists()
    run = rlhf(folder, killed, "counts", *options, "--resume")
    assert run.returncode == 0, run.stderr
    found = metrics(folder / killed / "ppo.jsonl")
    assert [record["step"] for record in found] == [1, 2, 3, 4]
    assert found == metrics(folder / whole / "ppo.jsonl")
    for name in ("actor", "critic"):
        weights = [folder / run / name / "model.safetensors" for run in (whole, killed)]
        assert weights[0].read_bytes() == weights[1].read_bytes()


@pytest.mark.parametrize("missing", VARIABLES)
def test_a_launcher_without_its_variables(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    values = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    for name in VARIABLES:
        monkeypatch.setenv(name, values.get(name, "29500"))
    monkeypatch.delenv(missing)
    assert main(["sft", "--config", str(write_config(tmp_path))]) == 2
    assert f"but not {missing}: start several processes with torchrun" in capsys.readouterr().err


def test_deepspeeds_launcher_puts_its_rank_first() -> None:
    assert without_local_rank(["--local_rank=1", "sft", "--seed", "1"]) == ["sft", "--seed", "1"]


@pytest.mark.parametrize("count", ["0", "-1", "two"])
def test_impossible_numbers_of_processes(count: str, capsys) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["sft", "--nproc", count])
    assert exit.value.code == 2
    assert "nproc" in capsys.readouterr().err


def test_zero_on_one_process(tmp_path: Path) -> None:
    """Nobody launched it; DeepSpeed would ask MPI who it is."""
    command = [
        sys.executable, "-m", "rlhf.cli.main", "sft", "--config", str(write_config(tmp_path)),
        "--output_dir", str(tmp_path / "out"), "--zero_stage", "3",
    ]  # fmt: skip
    alone = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    run = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=150,
        env={**alone, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "out" / "sft" / "config.json").exists()
