"""What the command line refuses: one line that says what to do, and nothing half-written."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.cli.main import main
from tests.rlhf.tiny import LLAMA, error_line, write_config, write_rows

BAD_OPTIONS = {
    "unknown": (["--ppo.kl_coeff", "1"], "--ppo.kl_coeff"),
    "not-a-number": (["--ppo.kl_coef", "much"], "much"),
    "out-of-range": (["--ppo.kl_coef", "-1"], "kl_coef must be 0 or more, got -1.0"),
    "fraction": (["--ppo.lam", "1.5"], r"lam must be in \[0, 1\], got 1.5"),
    "choice": (["--sft.optimizer.schedule", "sine"], "sine"),
    "contradiction": (["--model.path", "x"], "model.path and model.init exclude each other"),
    "mini-batches": (["--ppo.mini_batches", "9"], r"mini_batches \(9\) must not exceed"),
    "kl-target": (["--ppo.kl_target", "0"], "kl_target must be positive, got 0.0"),
    "smoothing": (["--dpo.loss", "ipo", "--dpo.label_smoothing", "0.1"], "ipo has none"),
    "warm-up": (["--ppo.critic_warmup", "2"], r"critic_warmup \(2\) must be below iterations"),
    "eos-of-nothing": (["--model.eos_token", "<end>"], "give model.tokenizer too"),
    "metric": (["--evaluation.metric", "nowhere:f"], "nowhere:f.*give module:function"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_option(rlhf, tmp_path: Path, name: str) -> None:
    arguments, message = BAD_OPTIONS[name]
    code, stderr = rlhf("run", *arguments)
    assert code == 2
    assert "Traceback" not in stderr
    assert re.search(message, stderr)
    assert not (tmp_path / "out").exists()


def test_unknown_field_in_the_file(tmp_path: Path, rlhf) -> None:
    write_config(tmp_path, ppo={"klcoef": 0.1})
    code, stderr = rlhf("ppo")
    assert code == 2
    assert "klcoef" in stderr
    assert "Traceback" not in stderr


@pytest.mark.parametrize(
    ("section", "name"),
    [({"sft": 3}, "sft"), ({"ppo": {"data": None}}, "ppo.data")],
    ids=["number", "empty-inside"],
)
def test_no_section_where_one_belongs(rlhf, tmp_path: Path, section: dict, name: str) -> None:
    write_config(tmp_path, **section)
    assert f"{name}: expected a section with options of its own" in error_line(rlhf("sft"))


def test_missing_configuration_file(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["run", "--config", "nowhere.yaml"])
    assert exit.value.code == 2
    assert "nowhere.yaml" in capfd.readouterr().err


def bad_data(folder: Path, name: str) -> tuple[str, list[str], str]:
    """The step, its options, and what the message has to say."""
    file = folder / "rows.jsonl"
    long = {"prompt": "very " * 200, "completion": "yes"}
    if name == "missing-file":
        return "sft", ["--sft.data.name", str(folder / "no.jsonl")], "no.jsonl"
    if name == "missing-column":
        path = write_rows(file, [{"question": "1 + 1?", "solution": "2"}])
        return "sft", ["--sft.data.name", path], "question, solution"
    if name == "wrong-mapping":
        path = write_rows(file, [{"question": "1 + 1?", "solution": "2"}])
        option = ["--sft.data.name", path, "--sft.data.columns", '{"prompt": "ask"}']
        return "sft", option, "no column ask.*question, solution"
    if name == "empty-file":
        return "sft", ["--sft.data.name", write_rows(file, [])], "no rows"
    if name == "prompts-over-the-limit":
        path = write_rows(file, [{**long, "prompt": f"{i} {long['prompt']}"} for i in range(60)])
        option = ["--sft.data.name", path, "--sft.data.heldout_fraction", "0.3"]
        return "sft", option, "all .* prompts are over the limit of 120 tokens"
    return "sft", ["--sft.data.name", "no/such-dataset"], "no/such-dataset"


@pytest.mark.parametrize(
    "name",
    ["missing-file", "missing-column", "wrong-mapping", "empty-file", "prompts-over-the-limit"],
)
def test_bad_data(rlhf, tmp_path: Path, name: str) -> None:
    step, arguments, message = bad_data(tmp_path, name)
    line = error_line(rlhf(step, *arguments))
    assert re.search(message, line)
    assert not (tmp_path / "out" / "sft").exists()
    assert not (tmp_path / "out" / "sft.md").exists()


MODELS = {
    "no-model": ({}, "give model.path, a folder or hub name, or model.init"),
    "family": ({"init": {"model_type": "xglm", "d_model": 16, "num_layers": 1}}, "'xglm'"),
    "opt-350m": (
        {"init": {"model_type": "opt", "hidden_size": 48, "word_embed_proj_dim": 24}},
        "word_embed_proj_dim",
    ),
    "no-such-type": ({"init": {"model_type": "lama"}}, "'lama'; it knows .*llama, .*opt"),
    "missing-folder": ({"path": "./nowhere"}, "nowhere"),
    "heads": ({"init": {**LLAMA, "num_attention_heads": 5}}, "not a multiple of the number"),
    "type": ({"init": {**LLAMA, "hidden_size": "big"}}, "'hidden_size' expected int"),
    "typo": ({"init": {**LLAMA, "hiden_size": 64}}, "no 'hiden_size'; is 'hidden_size' meant"),
    "silent-template": (
        {"init": LLAMA, "vocab_size": 280, "chat_template": "{{ messages[0].text }}"},
        "chat_template leaves out what the user says",
    ),
    "small-vocabulary": ({"init": LLAMA, "vocab_size": 100}, "vocab_size 100 is too small"),
}


@pytest.mark.parametrize("name", MODELS)
def test_bad_model(rlhf, tmp_path: Path, name: str) -> None:
    model, message = MODELS[name]
    write_config(tmp_path, model=model)
    line = error_line(rlhf("sft"))
    assert re.search(message, line)
    assert not (tmp_path / "out" / "sft").exists()


@pytest.mark.parametrize(("step", "missing"), [("reward", "sft"), ("ppo", "sft")])
def test_a_step_without_the_one_before(rlhf, step: str, missing: str) -> None:
    line = error_line(rlhf(step))
    assert f"no {missing} model" in line
    assert f"run `rlhf {missing}`" in line


def test_debug_shows_the_traceback(rlhf) -> None:
    with pytest.raises(ValueError, match="no sft model"):
        rlhf("ppo", "--debug")


def test_the_output_folder_is_a_file(rlhf, tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    line = error_line(rlhf("sft"))
    assert f"cannot write into the folder {tmp_path / 'out'}" in line
    assert "give another output_dir" in line


def test_a_metric_that_fails_does_so_before_training(rlhf, tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text("def strict(prompts, completions, answer): return [1.0]")
    assert rlhf("sft")[0] == 0
    line = error_line(rlhf("dpo", "--evaluation.metric", f"{tmp_path}/judge.py:strict"))
    assert "reward function strict: missing a required argument: 'answer'" in line
    assert not (tmp_path / "out" / "dpo.jsonl").exists()


def test_chat_with_a_run_and_not_with_a_model(tmp_path: Path, capfd) -> None:
    for name in ("sft", "actor"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    assert main(["chat", str(tmp_path)]) == 2
    assert "Give the model in it that you mean: actor, sft" in capfd.readouterr().err


def test_chat_with_nobody(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", "/nowhere"]) == 2
    assert "no such folder: /nowhere" in capfd.readouterr().err


@pytest.mark.parametrize(("every", "where"), [("0", "sft"), ("1", "checkpoints/sft")])
def test_a_full_disk_leaves_nothing_that_looks_finished(
    rlhf, tmp_path: Path, every: str, where: str
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))  # metrics fit, the model does not
    try:
        found = rlhf("sft", "--checkpoint.every_steps", every)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    line = error_line(found)
    assert "cannot write" in line
    assert str(tmp_path / "out" / where) in line
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left <= {"sft.jsonl", "tensorboard", "checkpoints"}
    assert list((tmp_path / "out").glob("checkpoints/sft/*")) == []


def test_no_compiler(tmp_path: Path) -> None:
    """As a process of its own, since kernels are built on import: one line and nothing else."""
    environment = {
        "CXX": "/nonexistent", "PATH": str(tmp_path), "HYBRID_ENGINE_NATIVE": "require",
        "HYBRID_ENGINE_CACHE_DIR": str(tmp_path / "cache"), "HOME": str(tmp_path),
    }  # fmt: skip
    command = [sys.executable, "-m", "rlhf.cli.main", "chat", str(tmp_path)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 2, run.stderr
    assert run.stderr.startswith("rlhf chat: error: no C++ compiler found")
    assert "HYBRID_ENGINE_NATIVE=off" in run.stderr
    assert run.stderr.count("\n") == 1
