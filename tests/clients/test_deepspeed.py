"""A script of DeepSpeed-Chat's shape, in a process of its own, without and with the engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hybrid_engine import ops

pytest.importorskip("deepspeed")

SCRIPT = Path(__file__).with_name("deepspeed_chat_step3.py")


def test_step_3_script_runs_unchanged_and_faster() -> None:
    environment = {**os.environ, "HYBRID_ENGINE_CHECK": "0", "DS_ACCELERATOR": "cpu"}
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "plain", "accelerated"], capture_output=True, text=True,
        timeout=300, env=environment, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    records = [line for line in result.stdout.splitlines() if line.startswith("{")]
    plain, accelerated = (json.loads(line) for line in records)
    assert accelerated["served"] == 3
    assert accelerated["fallbacks"] == {}
    assert accelerated["sequences"] == plain["sequences"]
    assert accelerated["losses"] == pytest.approx(plain["losses"], rel=1e-4)
    assert plain["losses"][2] < plain["losses"][0]
    if ops.NATIVE.library is not None:  # the reference is not meant to be fast
        assert min(accelerated["rollout_seconds"]) < min(plain["rollout_seconds"])
