"""The command line: what it explains, what it refuses in one line, and the whole run."""

from __future__ import annotations

import ast
import inspect
import json
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlhf import config as config_module
from rlhf.cli.main import main
from rlhf.config import RunConfig

STEPS = ["run", "sft", "reward", "dpo", "ppo"]
LLAMA = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
}  # fmt: skip
TINY: dict[str, Any] = {
    "model": {"init": LLAMA, "vocab_size": 280},
    "sft": {"data": {"rows": 16, "heldout_rows": 8, "max_length": 120}, "batch_size": 8},
    "reward": {"data": {"rows": 16, "heldout_rows": 8, "max_length": 120}, "batch_size": 8},
    "dpo": {
        "data": {"rows": 16, "heldout_rows": 8, "max_length": 120}, "batch_size": 8,
        "max_new_tokens": 6,
    },
    "ppo": {
        "data": {"rows": 16, "heldout_rows": 8, "max_length": 100}, "iterations": 2,
        "batch_size": 4, "max_new_tokens": 6,
    },
    "evaluation": {"prompts": 4, "samples": 2, "metric": "rlhf.data.synthetic:quality"},
}  # fmt: skip


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY))
    return path


@pytest.fixture
def rlhf(config_file: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Run a step of the tiny configuration; the exit code and what it said on stderr."""

    def run(step: str, *arguments: str) -> tuple[int, str]:
        command = [step, "--config", str(config_file), "--output_dir", str(tmp_path / "out")]
        capfd.readouterr()
        try:
            code = main([*command, *arguments])
        except SystemExit as exit:
            code = int(exit.code or 0)
        return code, capfd.readouterr().err

    return run


def error_line(found: tuple[int, str]) -> str:
    """The one line of a user error."""
    code, stderr = found
    assert code == 2
    assert "Traceback" not in stderr
    lines = [line for line in stderr.splitlines() if "error:" in line]
    assert len(lines) == 1, stderr
    assert stderr.splitlines()[-1] == lines[0]
    return lines[0]


def explained_fields(kind: type, prefix: str = "") -> dict[str, str]:
    """Option -> the docstring under its field, for every field of the configuration."""
    tree = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(tree, ast.ClassDef)
    sentences = {
        field.target.id: ast.literal_eval(sentence.value)
        for field, sentence in zip(tree.body, tree.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(sentence, ast.Expr)
    }
    found = {}
    for field in fields(kind):
        assert field.name in sentences, f"{kind.__name__}.{field.name} is not explained"
        nested = getattr(config_module, str(field.type), None)
        if is_dataclass(nested):
            found |= explained_fields(nested, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = sentences[field.name]
    return found


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--help"])
    assert exit.value.code == 0
    text = capsys.readouterr().out
    for command in (*STEPS, "chat"):
        assert command in text


def test_help_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["ppo", "--help"])
    assert exit.value.code == 0
    words = " ".join(capsys.readouterr().out.split())
    explained = explained_fields(RunConfig)
    assert len(explained) > 60
    for option, sentence in explained.items():
        assert f"--{option}" in words, option
        assert " ".join(sentence.split()).rstrip(".") in words, option


def test_help_does_not_wait_for_torch() -> None:
    code = (
        "import sys, contextlib, io\n"
        "from rlhf.cli.main import main\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        "    main(['run', '--help'])\n"
        "print(sorted({'torch', 'transformers', 'datasets'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize("step", ["run", "ppo"])
def test_print_config_can_be_fed_back(
    step: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def printed(*arguments: str) -> str:
        with pytest.raises(SystemExit) as exit:
            main([step, *arguments, "--print_config"])
        assert exit.value.code == 0
        return capsys.readouterr().out

    first = printed("--ppo.kl_coef", "0.125", "--sft.data.rows", "7", "--seed", "3")
    settings = yaml.safe_load(first)
    assert settings["ppo"]["kl_coef"] == 0.125
    assert settings["sft"]["data"]["rows"] == 7
    assert settings["seed"] == 3
    assert settings["ppo"]["lam"] == 0.95
    (tmp_path / "again.yaml").write_text(first)
    assert printed("--config", str(tmp_path / "again.yaml")) == first
    overridden = yaml.safe_load(printed("--config", str(tmp_path / "again.yaml"), "--seed", "4"))
    assert overridden == {**settings, "seed": 4}


BAD_OPTIONS = {
    "unknown": (["--ppo.kl_coeff", "1"], "--ppo.kl_coeff"),
    "not-a-number": (["--ppo.kl_coef", "much"], "much"),
    "out-of-range": (["--ppo.kl_coef", "-1"], "kl_coef must be 0 or more, got -1.0"),
    "fraction": (["--ppo.lam", "1.5"], r"lam must be in \[0, 1\], got 1.5"),
    "choice": (["--sft.optimizer.schedule", "sine"], "sine"),
    "contradiction": (["--model.path", "x"], "model.path and model.init exclude each other"),
    "mini-batches": (["--ppo.mini_batches", "9"], r"mini_batches \(9\) must not exceed"),
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


def test_unknown_field_in_the_file(config_file: Path, rlhf) -> None:
    config_file.write_text(yaml.safe_dump({**TINY, "ppo": {"klcoef": 0.1}}))
    code, stderr = rlhf("ppo")
    assert code == 2
    assert "klcoef" in stderr
    assert "Traceback" not in stderr


def test_missing_configuration_file(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["run", "--config", "nowhere.yaml"])
    assert exit.value.code == 2
    assert "nowhere.yaml" in capfd.readouterr().err


def rows_file(folder: Path, *rows: dict[str, Any]) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def bad_data(folder: Path, name: str) -> tuple[str, list[str], str]:
    """The step, its options, and what the message has to say."""
    long = {"prompt": "very " * 200, "completion": "yes"}
    if name == "missing-file":
        return "sft", ["--sft.data.name", str(folder / "no.jsonl")], "no.jsonl"
    if name == "missing-column":
        path = rows_file(folder, {"question": "1 + 1?", "solution": "2"})
        return "sft", ["--sft.data.name", path], "question, solution"
    if name == "wrong-mapping":
        path = rows_file(folder, {"question": "1 + 1?", "solution": "2"})
        option = ["--sft.data.name", path, "--sft.data.columns", '{"prompt": "ask"}']
        return "sft", option, "no column ask.*question, solution"
    if name == "empty-file":
        return "sft", ["--sft.data.name", rows_file(folder)], "no rows"
    if name == "prompts-over-the-limit":
        path = rows_file(folder, *[{**long, "prompt": f"{i} {long['prompt']}"} for i in range(60)])
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
    "small-vocabulary": ({"init": LLAMA, "vocab_size": 100}, "vocab_size 100 is too small"),
}


@pytest.mark.parametrize("name", MODELS)
def test_bad_model(rlhf, config_file: Path, tmp_path: Path, name: str) -> None:
    model, message = MODELS[name]
    config_file.write_text(yaml.safe_dump({**TINY, "model": model}))
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
    (folder / "tiny.yaml").write_text(yaml.safe_dump(TINY))
    options = ["--config", str(folder / "tiny.yaml"), "--output_dir", str(folder / "out")]
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
        path = tmp_path / f"{letter}.jsonl"
        path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
        names.append(str(path))
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
