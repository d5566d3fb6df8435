"""Our Triton kernels in Triton's interpreter, under the very tests that the CPU and a GPU pass.

In processes of their own, because Triton reads TRITON_INTERPRET when a kernel is defined.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
OPS = HERE.parent / "ops"
# The tilings of the CPU version and fp64 are not the kernels'; opcheck, which runs an op a dozen
# times, looks at nothing that depends on the dtype.
LEFT_OUT = (
    "many-tiles or gradcheck or gradient_buffer or all_logits or (opcheck and (bf16 or fp16))"
)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


@pytest.mark.parametrize(
    "file",
    [HERE / "interpreted.py", OPS / "test_training_ops.py", OPS / "test_logprob.py"],
    ids=["machinery", "norm-swiglu-rope", "linear_logprob"],
)
def test_kernels_in_the_interpreter(file: Path) -> None:
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "HYBRID_ENGINE_NATIVE": "off",
        "HYBRID_ENGINE_CHECK": "1" if file.parent == OPS else "0",
        "PYTHONPATH": str(HERE),
    }
    options = ["-p", "interpreter", "-p", "no:cacheprovider", "-m", "not gpu", "-q", "-W", "ignore"]
    chosen = ["-k", f"not ({LEFT_OUT})"] if file.parent == OPS else []
    command = [sys.executable, "-m", "pytest", *options, *chosen, str(file)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1], timeout=600
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1]
