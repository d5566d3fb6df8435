"""What every simulated rank imports, once: the fork server does, and the ranks inherit it."""

from __future__ import annotations

import importlib
import os
import sys
import warnings

os.environ["OMP_NUM_THREADS"] = "1"  # the ranks share the machine's cores
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.setdefault("DS_LOG_LEVEL", "warning")

# DeepSpeed calls collectives by names that newer torch deprecates.
warnings.filterwarnings("ignore", category=FutureWarning)

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "opt", "gpt2", "gpt_neox", "bloom"]

for module in (
    "torch",
    "deepspeed",
    "torch._dynamo",
    "torch._inductor.utils",
    "deepspeed.compile.backend",
    *(f"transformers.models.{family}.modeling_{family}" for family in FAMILIES),
    "peft",
    "pytest",
    "hybrid_engine",
    "rlhf",
):
    importlib.import_module(module)

# DeepSpeed compiles its shared-memory collectives when it starts, minutes long; gloo serves.
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
