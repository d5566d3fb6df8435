"""The native runtime's own parts, by programs that are compiled and run here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hybrid_engine import ops

ROOT = Path(__file__).parent.parent

# Responses after 700 tokens by a model with one kv head, so that its keys are split.
RESPONSES = """
import sys, torch, hybrid_engine as he
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=301, hidden_size=512, intermediate_size=1024, num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=1, max_position_embeddings=1024, eos_token_id=None,
)).eval()
assert torch.get_num_threads() == 2
engine = he.HybridEngine(model)
with engine.rollout():
    loop = engine.start([torch.arange(3, 300).repeat(3)[:700].tolist()], he.SamplingParams(
        max_new_tokens=40, seed=1))
    while not loop.done:
        loop.step(32)
    assert loop.program is not None
torch.save(loop.rollout().logprobs, sys.argv[1])
"""


def test_team_size_follows_the_machine(tmp_path: Path) -> None:
    source, binary = ROOT / "tests/runtime/team_size.cpp", tmp_path / "team_size"
    compiler = os.environ.get("CXX", "g++")
    subprocess.run(
        [compiler, "-std=c++20", "-O1", f"-I{ROOT / 'csrc'}", str(source), "-o", str(binary)],
        check=True,
    )
    found = subprocess.run([str(binary)], capture_output=True, text=True)
    assert (found.returncode, found.stdout) == (0, "")


@pytest.mark.skipif(ops.NATIVE.isa is None, reason="needs the native kernels")
def test_a_smaller_team_changes_no_bit(tmp_path: Path) -> None:
    import torch

    files = []
    for limit in ("1", "2"):
        files.append(tmp_path / f"{limit}.pt")
        subprocess.run(
            [sys.executable, "-c", RESPONSES, str(files[-1])],
            env=os.environ | {"OMP_NUM_THREADS": "2", "OMP_THREAD_LIMIT": limit},
            cwd=ROOT,
            check=True,
        )
    one, two = (torch.load(file) for file in files)
    assert torch.equal(one, two)
