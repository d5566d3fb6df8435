"""When Triton serves CUDA tensors, and what is said when it does not."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from hybrid_engine.ops import triton


def test_a_torch_without_cuda_has_no_use_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRID_ENGINE_NATIVE", "auto")
    monkeypatch.setattr(torch.version, "cuda", None)
    assert triton.load() == triton.TritonStatus((), "this build of torch has no CUDA")


def test_off_leaves_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRID_ENGINE_NATIVE", "off")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert triton.load() == triton.TritonStatus((), "HYBRID_ENGINE_NATIVE=off")


@pytest.fixture
def _without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    for name in [name for name in sys.modules if name.startswith(f"{triton.__name__}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)


@pytest.mark.usefixtures("_without_triton")
def test_auto_warns_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRID_ENGINE_NATIVE", "auto")
    with pytest.warns(
        RuntimeWarning, match=r"on their PyTorch reference on the GPU, because: .*triton"
    ):
        status = triton.load()
    assert status.ops == ()
    assert "triton" in str(status.reason)


@pytest.mark.usefixtures("_without_triton")
def test_require_raises_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HYBRID_ENGINE_NATIVE", "require")
    with pytest.raises(ImportError, match="triton"):
        triton.load()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_all_training_ops_are_served_on_cuda() -> None:
    program = """
import sys
import torch
from hybrid_engine import ops
assert ops.TRITON.ops == () and "hybrid_engine.ops.triton.launchers" not in sys.modules
torch.version.cuda = "13.0"
served = ops.triton.load().ops
print(*sorted(name for name in ops.OPS if ops.OPS[name].implementation("cuda") == "triton"))
assert set(served) == {name for name in ops.OPS if ops.OPS[name].triton_keys}
"""
    if torch.version.cuda is not None:
        pytest.skip("a torch with CUDA registers when it is imported")
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"HYBRID_ENGINE_NATIVE": "auto"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "linear_logprob",
        "linear_logprob_backward",
        "rms_norm",
        "rms_norm_backward",
        "rope",
        "swiglu",
        "swiglu_backward",
    ]
