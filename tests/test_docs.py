"""What the pages name is there: files, anchors, tests, commands and their options, variables."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from rlhf.bench.peers import PEERS
from rlhf.cli.deepspeed_chat import as_lists
from rlhf.cli.main import build_parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    ROOT / "benchmarks" / "README.md",
    ROOT / "tests" / "cuda_emulator" / "README.md",
]
FOLDERS = "csrc|hybrid_engine|rlhf|tests|benchmarks|examples|docs"

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


@pytest.fixture(scope="module")
def parser() -> ArgumentParser:
    return build_parser()


def commands() -> list[str]:
    """Every `rlhf` command of the pages' blocks and of the examples' comments, on one line each."""
    found = []
    for path in [*PAGES, *(ROOT / "examples").glob("*.yaml")]:
        text = path.read_text().replace("\\\n", " ")
        for line in text.splitlines():
            command = re.sub(r"^# +|^ +", "", line)  # a comment, or an indented block
            command = re.sub(r"^(\w+=\S+ )+(?=rlhf )", "", command)
            command = re.sub(r"^torchrun .* -m rlhf\.cli\.main ", "rlhf ", command)
            command = re.sub(r"\s+# .*", "", command)
            if re.match(r"rlhf [a-z]+ .*-", command):
                found += [part.strip() for part in command.split("&&")]
    return sorted(set(found))


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        file, _, anchor = target.partition("#")
        linked = page.parent / file if file else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@each_page
def test_every_named_path_exists(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./*<>-]*", text):
        if "<" not in path:  # `tests/ops/test_<family>.py`
            assert list(ROOT.glob(path.rstrip("./"))), path


@each_page
def test_prose_is_wrapped(page: Path) -> None:
    """At 100 columns, but for tables and code, as `make format` does with code."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for line in prose.splitlines():
        assert len(line) <= 100 or line.startswith(("|", "    ")), line


@pytest.mark.parametrize("command", commands())
def test_every_command_is_accepted(command: str, parser: ArgumentParser) -> None:
    """Options, and what the configuration says of their values; readers' own files stand aside."""
    words = shlex.split(re.sub(r"--config (?!examples/)\S+", "", command))[1:]
    words = [word for word in words if word not in ("--help", "--print_config")]
    options = parser.parse_args(as_lists(words))
    parser.instantiate(options)
    if options.command == "bench":
        assert set(options.bench.peers.split(",")) <= PEERS.keys()


def test_every_peer_is_explained() -> None:
    table = (ROOT / "docs" / "performance.md").read_text()
    assert not {peer for peer in PEERS if f"\n| `{peer}` |" not in table}


def test_the_pages_have_commands() -> None:
    assert len(commands()) > 20


def test_every_variable_is_in_the_readme() -> None:
    sources = [path for name in ("hybrid_engine", "rlhf") for path in (ROOT / name).rglob("*.py")]
    read = {
        variable
        for path in [*sources, ROOT / "setup.py"]
        for variable in re.findall(r"\bHYBRID_ENGINE_[A-Z]\w+", path.read_text())
    }
    table = (ROOT / "README.md").read_text()
    assert read
    assert not {variable for variable in read if f"`{variable}`" not in table}


def test_every_linked_test_exists() -> None:
    text = (ROOT / "docs" / "rlhf.md").read_text()
    table = text[text.index("## What is tested where") :]
    path, found = Path(), 0
    for file, function in re.findall(r"`([\w/.]*\.py)?(?:::(\w+))?(?:\[[\w-]+\])?`", table):
        if file:
            path = ROOT / (file if "/" in file else f"tests/rlhf/{file}")
            assert path.is_file(), path
        if function:
            assert f"def {function}(" in path.read_text(), f"{path}: {function}"
        found += bool(file or function)
    assert found > 40
