"""Compile to cubin, without a GPU, every kernel that the launchers launch; print what ptxas made.

The launchers run as they are, on CPU tensors, with a driver that names a GPU and a launch that only
compiles: so the signatures, specialisations, block sizes and warps are those of a real launch.
`python tests/triton/compile_kernels.py` prints one JSON record a kernel, case and architecture.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from hybrid_engine.ops.triton import logprob, logprob_backward, norm, rope, swiglu

ARCHITECTURES = (80, 90)
HALF, FULL = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Compiled:
    kernel: str
    case: str
    architecture: int
    warps: int
    shared: int  # bytes a block
    registers: int  # a thread
    stack: int  # bytes a thread; above 0: registers are spilled, or an array is indexed
    tensor_cores: str  # the instruction: wgmma, mma or none


class OfflineDriver:
    """What a launch asks the CUDA driver before it compiles."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


def norm_case(rows: int, dim: int, dtype: torch.dtype, weight: bool = True) -> None:
    x, w = torch.randn(rows, dim).to(dtype), torch.randn(dim).to(dtype)
    norm.rms_norm(x, w, 1e-6)
    norm.rms_norm_backward(x, x, w, 1e-6, 0.0, weight)


def swiglu_case(rows: int, dim: int, dtype: torch.dtype) -> None:
    gate, up = torch.randn(rows, 2 * dim).to(dtype).chunk(2, -1)
    swiglu.swiglu(gate, up)
    swiglu.swiglu_backward(gate, gate, up)


def rope_case(heads: int, kv_heads: int, dim: int, rotary: int, interleaved: bool = False) -> None:
    q, k = torch.randn(2, heads, 16, dim).to(HALF), torch.randn(2, kv_heads, 16, dim).to(HALF)
    table = torch.randn(1, 16, rotary // 2)
    rope.rope(q, k, table, table, interleaved)


def logprob_case(
    rows: int, dim: int, dtype: torch.dtype, bias: bool = False, softcap: float = 0.0
) -> None:
    vocabulary = 512
    hidden, weight = torch.randn(rows, dim).to(dtype), torch.randn(vocabulary, dim).to(dtype)
    inputs = (hidden, weight, torch.zeros(rows, dtype=torch.int64))
    options = (weight[:, 0].contiguous() if bias else None,)
    statistics = logprob.linear_logprob(*inputs, *options, 1.0, softcap)[1:]
    upstream = torch.ones(rows), torch.ones(rows)
    logprob_backward.linear_logprob_backward(
        [True, False, False], *upstream, *inputs, *options, *statistics, 1.0, softcap
    )


CASES: dict[str, Callable[[], None]] = {
    "bf16-D64": lambda: norm_case(64, 64, HALF),
    "bf16-D4096": lambda: norm_case(32, 4096, HALF),
    "bf16-D8192": lambda: norm_case(32, 8192, HALF),
    "fp32-D1-N1": lambda: norm_case(1, 1, FULL),
    "fp32-D8192": lambda: norm_case(32, 8192, FULL),
    "bf16-D4096-frozen": lambda: norm_case(32, 4096, HALF, weight=False),
    "bf16-I4096": lambda: swiglu_case(4, 4096, HALF),
    "fp32-I1-N1": lambda: swiglu_case(1, 1, FULL),
    "H32-K8-D128": lambda: rope_case(32, 8, 128, 128),
    "H32-K32-D80-R32": lambda: rope_case(32, 32, 80, 32),
    "H1-K1-D256-interleaved": lambda: rope_case(1, 1, 256, 256, True),
    "bf16": lambda: logprob_case(256, 896, HALF),
    "bf16-bias-cap": lambda: logprob_case(256, 896, HALF, bias=True, softcap=30.0),
    "bf16-N1-D63-ragged": lambda: logprob_case(1, 63, HALF),
    "fp32": lambda: logprob_case(256, 896, FULL),
    "tf32-bias-cap": lambda: with_tf32(logprob_case, 256, 896, FULL, True, 30.0),
}


def with_tf32(function: Callable[..., None], *args: Any) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    function(*args)
    torch.set_float32_matmul_precision(before)


def compile_all() -> Iterator[Compiled]:
    launch = JITFunction.run
    launched: list[Any] = []

    def only_compile(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launched.append(launch(self, *args, grid=grid, warmup=True, **kwargs))

    JITFunction.run = only_compile
    for architecture in ARCHITECTURES:
        triton.runtime.driver.set_active(OfflineDriver(architecture))
        for case, call in CASES.items():
            launched.clear()
            call()
            for kernel in {id(kernel): kernel for kernel in launched}.values():
                yield record(kernel, case, architecture)


def record(kernel: Any, case: str, architecture: int) -> Compiled:
    usage = resource_usage(kernel.asm["cubin"])
    ptx = kernel.asm["ptx"]
    return Compiled(
        kernel=kernel.metadata.name,
        case=case,
        architecture=architecture,
        warps=kernel.metadata.num_warps,
        shared=kernel.metadata.shared,
        registers=usage["REG"],
        stack=usage["STACK"],
        tensor_cores=next(
            (i for i in ("wgmma", "mma") if f" {i}." in ptx or f"\t{i}." in ptx), "none"
        ),
    )


def resource_usage(cubin: bytes) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def all_kernels() -> list[str]:
    modules: list[ModuleType] = [norm, swiglu, rope, logprob, logprob_backward]
    return [name for module in modules for name in vars(module) if name.endswith("_kernel")]


if __name__ == "__main__":
    records = [asdict(compiled) for compiled in compile_all()]
    json.dump({"kernels": all_kernels(), "records": records}, sys.stdout)
