"""The command line explains itself: every option, and a configuration that can be fed back."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml

from rlhf import config as config_module
from rlhf.cli.main import main
from rlhf.config import RunConfig

STEPS = ["run", "sft", "reward", "dpo", "ppo"]


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
