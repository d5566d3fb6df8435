"""Imports point downwards: a module knows the floors below its own, and nothing above."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the ground up. Neighbours on a floor do not know each other; a bare package is its __init__.
FLOORS = [
    ["hybrid_engine.ops", "hybrid_engine.parallel", "hybrid_engine.eval_mode"],
    ["hybrid_engine.cache"],
    ["hybrid_engine.weights"],
    ["hybrid_engine.models"],
    ["hybrid_engine.generation"],
    ["hybrid_engine.config"],
    ["hybrid_engine.joint"],
    ["hybrid_engine.engine"],
    ["hybrid_engine.self_check", "hybrid_engine.hf_request", "hybrid_engine.hf_output"],
    ["hybrid_engine.accelerate"],
    ["hybrid_engine.speedup"],
    ["hybrid_engine"],
    [
        "rlhf.config",
        "rlhf.distributed",
        "rlhf.files",
        "rlhf.losses",
        "rlhf.advantages",
        "rlhf.kl",
        "rlhf.experience",
        "rlhf.plan",
    ],
    ["rlhf.manifest"],
    ["rlhf.data", "rlhf.models", "rlhf.engines", "rlhf.checkpoint", "rlhf.tracking"],
    ["rlhf.rewards"],
    ["rlhf.trainers"],
    ["rlhf.evaluation"],
    ["rlhf.progress"],
    ["rlhf.pipeline"],
    ["rlhf.bench"],
    ["rlhf.cli"],
    ["rlhf"],
]
FLOOR_OF = {part: number for number, parts in enumerate(FLOORS) for part in parts}
OURS = {"hybrid_engine", "rlhf"}
NEVER = {"tests", "benchmarks", "examples"}
MATHS = ["rlhf.losses", "rlhf.advantages", "rlhf.kl", "rlhf.experience"]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for name in sorted(OURS) for path in (ROOT / name).rglob("*.py")}


def part_of(module: str) -> str:
    """The entry of the table that a module belongs to."""
    if module in OURS:
        return module
    return ".".join(module.split(".")[:2])


def imports(source: str) -> Iterator[str]:
    """Every module that a source names, inside functions and TYPE_CHECKING too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if submodule in FILES else node.module


def violations(module: str, source: str) -> list[str]:
    """What a module must not import."""
    part = part_of(module)
    found = []
    for imported in imports(source):
        top, other = imported.split(".")[0], part_of(imported)
        upwards = top in OURS and other != part and FLOOR_OF[other] >= FLOOR_OF[part]
        foreign = top in NEVER or (top == "deepspeed" and module.startswith("hybrid_engine"))
        if upwards or foreign:
            found.append(f"{module} imports {imported}")
    return found


def test_every_module_has_a_floor() -> None:
    assert {part_of(module) for module in FILES} == set(FLOOR_OF)


@pytest.mark.parametrize("module", FILES)
def test_imports_point_downwards(module: str) -> None:
    assert violations(module, FILES[module].read_text()) == []


@pytest.mark.parametrize("module", MATHS)
def test_maths_knows_torch_and_the_ops_only(module: str) -> None:
    names = set(imports(FILES[module].read_text())) - {"hybrid_engine.ops"}
    assert {name.split(".")[0] for name in names} <= {"torch", *sys.stdlib_module_names}


BREACHES = [
    ("hybrid_engine.cache.kv_cache", "from hybrid_engine.weights import FusedParameters"),
    ("hybrid_engine.models.decoder", "import hybrid_engine.engine"),
    ("hybrid_engine.models.decoder", "from hybrid_engine import HybridEngine"),
    ("hybrid_engine.engine", "from rlhf.config import PPOConfig"),
    ("hybrid_engine.engine", "def f():\n    import deepspeed"),
    ("rlhf.losses", "from rlhf import advantages"),
    ("rlhf.data.sources", "from rlhf.models import load_scorer"),
    ("rlhf.trainers.ppo", "from rlhf import evaluation"),
    ("rlhf.pipeline", "from rlhf.cli.main import main"),
    ("rlhf.cli.main", "from tests.rlhf import helpers"),
]


@pytest.mark.parametrize(("module", "source"), BREACHES, ids=[source for _, source in BREACHES])
def test_a_breach_is_found(module: str, source: str) -> None:
    assert len(violations(module, source)) == 1


def test_only_the_bindings_know_what_a_tensor_is() -> None:
    """csrc stands on its own: kernels include no torch, and nothing includes Python or ATen."""
    sources = {
        path.relative_to(ROOT / "csrc"): re.findall(r'#include [<"](.+)[>"]', path.read_text())
        for path in (ROOT / "csrc").rglob("*.*")
    }
    assert any(path.parts[0] == "cpu" for path in sources)
    with_torch = {
        path.parts[0]
        for path, headers in sources.items()
        if any(header.startswith("torch/") for header in headers)
    }
    assert with_torch == {"bindings"}
    for path, headers in sources.items():
        for header in headers:
            assert not header.startswith(("Python.h", "ATen/", "c10/")), f"{path}: {header}"
            assert ".." not in header, f"{path}: {header}"
