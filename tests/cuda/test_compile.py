"""What nvcc makes of the kernels, wherever it is installed: they build, load and do not spill."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from hybrid_engine import ops
from hybrid_engine.ops import build
from tests.cuda_emulator.build import CSRC

# Families whose kernels read and write packs of 16 bytes.
VECTORISED = ("norm", "activation", "rope", "gather")


@pytest.fixture(scope="session")
def library() -> Path:
    """The real library, loaded here; the kernel cache keeps it until a source changes."""
    try:
        build.find_nvcc()
    except build.BuildError as error:
        pytest.skip(str(error))
    path = build.build_cuda(CSRC)
    torch.ops.load_library(str(path))
    return path


@dataclass(frozen=True)
class Kernel:
    """What ptxas says of one kernel for one architecture."""

    name: str
    architecture: str
    registers: int
    stack_bytes: int
    spilled_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.name} for {self.architecture}: {self.registers} registers, "
            f"{self.stack_bytes} bytes of stack, {self.spilled_bytes} spilled"
        )


REPORT = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<architecture>\w+)'\n"
    r".*\n"
    r" *(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\n"
    r".*Used (?P<registers>\d+) registers"
)


def kernels(log: str) -> list[Kernel]:
    found = [
        Kernel(
            readable(match["name"]),
            match["architecture"],
            int(match["registers"]),
            int(match["stack"]),
            int(match["stores"]) + int(match["loads"]),
        )
        for match in REPORT.finditer(log)
    ]
    assert len(found) == log.count("Compiling entry function"), "ptxas reports in another format"
    return found


def readable(mangled: str) -> str:
    if shutil.which("c++filt") is None:
        return mangled
    text = subprocess.run(["c++filt", mangled], capture_output=True, text=True).stdout.strip()
    return text.replace("he::cuda::(anonymous namespace)::", "").partition("(")[0]


def test_no_kernel_uses_stack_or_spills(library: Path) -> None:
    found = kernels(library.with_name("build.log").read_text())
    assert {kernel.architecture for kernel in found} == {
        f"sm_{architecture}" for architecture in build.CUDA_ARCHITECTURES
    }
    slow = [str(kernel) for kernel in found if kernel.stack_bytes or kernel.spilled_bytes]
    assert not slow, "\n".join(slow)


def test_the_report_of_a_spilling_kernel_is_read() -> None:
    log = (
        "ptxas info    : Compiling entry function '_Z4slowPf' for 'sm_80'\n"
        "ptxas info    : Function properties for _Z4slowPf\n"
        "    48 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers, 400 bytes cmem[0]\n"
    )
    (kernel,) = kernels(log)
    assert (kernel.architecture, kernel.registers) == ("sm_80", 255)
    assert (kernel.stack_bytes, kernel.spilled_bytes) == (48, 20)


@pytest.mark.skipif(ops.NATIVE.library is None, reason=str(ops.NATIVE.reason))
def test_every_op_with_a_cpu_kernel_has_a_cuda_kernel(library: Path) -> None:
    served = [op for op in ops.OPS.values() if op.implementation("cpu") == "native"]
    assert served
    assert [op.name for op in served if op.implementation("cuda") != "native"] == []


def test_cpu_tensors_still_take_the_cpu_kernels(library: Path) -> None:
    x, weight = torch.randn(3, 8), torch.randn(8)
    expected = ops.rms_norm.reference(x, weight, 1e-6)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-6), expected)


def test_a_cpu_tensor_handed_to_a_cuda_kernel_is_an_error(library: Path) -> None:
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(RuntimeError):
        ops.relu.overload.redispatch(cuda, torch.randn(3, 8))


@pytest.fixture(scope="session")
def machine_code(library: Path) -> dict[str, str]:
    """SASS of each kernel for Hopper, by mangled name."""
    triton = pytest.importorskip("triton", reason="its package carries cuobjdump")
    bundled = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    command = [bundled, "-sass", "-arch", f"sm_{build.CUDA_ARCHITECTURES[-1]}", library]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"\n\s*Function : (\w+)\n", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("family", VECTORISED)
def test_rows_move_by_16_bytes(machine_code: dict[str, str], family: str) -> None:
    codes = {name: code for name, code in machine_code.items() if f"_{family}_cu_" in name}
    assert codes
    for name, code in codes.items():
        for access in (r"LDG\.E\S*\.128", r"STG\.E\S*\.128"):
            assert re.search(access, code), f"{readable(name)} has no {access}"
        assert not re.search(r"\b(LD|ST)\.E", code), f"{readable(name)} has generic accesses"
