"""The emulator gives what the CUDA and PTX manuals say, and finds the mistakes it is there for."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from tests.cuda_emulator.build import (
    ASYNC_POLICIES,
    CSRC,
    EMULATOR,
    ORDERS,
    Schedule,
    build_emulated,
    build_program,
    scheduled,
    why_unavailable,
)

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))

PLANTED = [
    EMULATOR / name
    for name in ("planted_bugs.cu", "planted_pipeline_bugs.cu", "planted_bugs_driver.cu")
]
EVERY_SCHEDULE = [Schedule(order, policy, seed=1) for order in ORDERS for policy in ASYNC_POLICIES]
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # he::DType
WARP = 32

every_schedule = pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=str)
half_types = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])


@pytest.fixture(scope="session")
def library_path() -> Path:
    return build_emulated([EMULATOR / "self_test.cu", *PLANTED])


@pytest.fixture(scope="session")
def library(library_path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(library_path))


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def ints(*shape: int) -> torch.Tensor:
    return torch.full(shape, -1, dtype=torch.int32)


# ---- what each function gives --------------------------------------------------------------------


@every_schedule
def test_collectives(library: ctypes.CDLL, library_path: Path, schedule: Schedule) -> None:
    out = ints(16, WARP)
    with scheduled(library_path, schedule):
        library.collectives(pointer(out))
    lanes = range(WARP)
    expected = [
        [50] * WARP,  # __shfl_sync from lane 5
        [(lane // 8 * 8 + 5) * 10 for lane in lanes],  # in segments of 8
        [lane ^ 3 for lane in lanes],  # __shfl_xor_sync
        # In segments of 8: a lower segment can be read, for a higher one the own value comes.
        [lane ^ 12 if lane ^ 12 < lane // 8 * 8 + 8 else lane for lane in lanes],
        [lane + 4 if lane + 4 < WARP else lane for lane in lanes],  # __shfl_down_sync
        [lane + 4 if lane % 16 + 4 < 16 else lane for lane in lanes],
        [lane - 4 if lane >= 4 else lane for lane in lanes],  # __shfl_up_sync
        [lane - 4 if lane % 16 >= 4 else lane for lane in lanes],
        [sum(1 << lane for lane in lanes if lane % 3 == 0)] * WARP,  # __ballot_sync
        [1] * WARP,  # __any_sync
        [0] * WARP,  # __all_sync
        [sum(lanes)] * WARP,  # __reduce_add_sync
        [7 - 31] * WARP,  # __reduce_min_sync
        [7] * WARP,  # __reduce_max_sync
        [7] * WARP,  # twice the float 3.5 of lane 3
        [4] * WARP,  # a bfloat16
    ]
    assert out.tolist() == expected


@every_schedule
def test_lanes_that_met_before_meet_the_rest(
    library: ctypes.CDLL, library_path: Path, schedule: Schedule
) -> None:
    out = ints(2, WARP)
    with scheduled(library_path, schedule):
        library.partial_masks(pointer(out))
    assert out[0].tolist() == [lane ^ 1 if lane < 16 else lane for lane in range(WARP)]
    assert out[1].tolist() == [lane ^ 16 for lane in range(WARP)]


@every_schedule
def test_atomics(library: ctypes.CDLL, library_path: Path, schedule: Schedule) -> None:
    values = torch.arange(1000, dtype=torch.int32) % 7
    counts, total = torch.zeros(8, dtype=torch.int32), torch.zeros(1)
    extremes = torch.tensor([5, 5], dtype=torch.int32)
    with scheduled(library_path, schedule):
        library.atomics(
            pointer(counts), pointer(total), pointer(extremes), pointer(values), len(values)
        )
    assert counts.tolist() == torch.bincount(values, minlength=8).tolist()
    assert total.item() == values.sum().item() / 2
    assert extremes.tolist() == [0, 6]


@every_schedule
@pytest.mark.parametrize("threads", [33, 64])
def test_barriers_count_votes(
    library: ctypes.CDLL, library_path: Path, schedule: Schedule, threads: int
) -> None:
    out = ints(3, threads)
    with scheduled(library_path, schedule):
        library.barrier_votes(pointer(out), threads)
    has_thread_40 = int(threads > 40)
    assert out.tolist() == [
        [(threads + 1) // 2] * threads,
        [has_thread_40] * threads,
        [1 - has_thread_40] * threads,
    ]


@every_schedule
@pytest.mark.parametrize(("dim", "threads"), [(1, 32), (257, 96), (1000, 1024)])
def test_block_reductions(
    library: ctypes.CDLL, library_path: Path, schedule: Schedule, dim: int, threads: int
) -> None:
    rows = 3
    x = torch.randint(-50, -1, (rows, dim), dtype=torch.float32)  # whole numbers: sums are exact
    sums, maxima = torch.full((rows,), torch.nan), torch.full((rows,), torch.nan)
    with scheduled(library_path, schedule):
        library.reduce(pointer(sums), pointer(maxima), pointer(x), rows, dim, threads)
    assert sums.tolist() == x.sum(1).tolist()
    assert maxima.tolist() == x.amax(1).tolist()


@pytest.mark.parametrize("dtype", DTYPE_CODES, ids=["f32", "bf16", "f16"])
def test_packs_move_and_convert(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    x = torch.randn(8 * 77).to(dtype)
    out = torch.full_like(x, torch.nan)
    library.double_values(pointer(out), pointer(x), len(x), DTYPE_CODES[dtype])
    assert torch.equal(out, x * 2)


def test_ldmatrix_gives_the_layout_of_the_manual(library: ctypes.CDLL) -> None:
    matrices = torch.arange(4 * 8 * 8, dtype=torch.int16).view(4, 8, 8)
    out = ints(12, WARP)
    library.ldmatrix(pointer(out), pointer(matrices))

    def fragment(matrix: torch.Tensor) -> list[int]:
        """Register of each lane: two neighbours of row lane / 4, the first in the low half."""
        low, high = matrix.int().reshape(WARP, 2).unbind(1)
        return (low + high * 2**16).tolist()

    plain = [fragment(matrix) for matrix in matrices]
    transposed = [fragment(matrix.T) for matrix in matrices]
    assert out.tolist() == [*plain, *transposed, *plain[:2], *transposed[:2]]


@half_types
def test_mma_is_a_matrix_product(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    # Whole numbers, so that the order of the additions does not matter.
    a, b = (torch.randint(-9, 9, shape).to(dtype) for shape in ((16, 16), (16, 8)))
    c = torch.randint(-9, 9, (16, 8)).float()
    expected = c + a.float() @ b.float()
    library.mma(pointer(c), pointer(a), pointer(b), DTYPE_CODES[dtype])
    assert torch.equal(c, expected)


@half_types
def test_fused_multiply_add_rounds_once(library: ctypes.CDLL, dtype: torch.dtype) -> None:
    # The product of these needs more bits than the type has: rounding it first would give 0.
    step = torch.finfo(dtype).eps
    x = torch.full((64,), 1 + step).to(dtype)
    z = (-(x * x)).to(dtype)
    out = torch.full_like(x, torch.nan)
    library.fused_multiply_add(
        pointer(out), pointer(x), pointer(x), pointer(z), len(x) // 2, DTYPE_CODES[dtype]
    )
    assert out.tolist() == [step**2] * len(x)


# ---- schedules -----------------------------------------------------------------------------------


def tickets(library: ctypes.CDLL, path: Path, schedule: Schedule) -> list[int]:
    """When each of 2 blocks of 64 threads had its first turn."""
    out, counter = ints(2 * 64), torch.zeros(1, dtype=torch.int32)
    with scheduled(path, schedule):
        library.tickets(pointer(out), pointer(counter), 2, 64)
    return out.tolist()


def test_orders(library: ctypes.CDLL, library_path: Path) -> None:
    forward = tickets(library, library_path, Schedule("forward"))
    assert forward == list(range(128))
    assert tickets(library, library_path, Schedule("reverse")) == forward[::-1]
    assert sorted(tickets(library, library_path, Schedule("random"))) == forward
    greedy = tickets(library, library_path, Schedule("greedy", seed=3))
    for begin in range(0, 128, WARP):  # a warp at a time
        assert greedy[begin : begin + WARP] == list(range(greedy[begin], greedy[begin] + WARP))


def test_a_seed_repeats_its_order(library: ctypes.CDLL, library_path: Path) -> None:
    first, again, other = (
        tickets(library, library_path, Schedule("random", seed=seed)) for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("values", [(-1, 0), (len(ORDERS), 0), (0, len(ASYNC_POLICIES))], ids=str)
def test_configure_refuses_what_does_not_exist(
    library: ctypes.CDLL, values: tuple[int, int]
) -> None:
    order, policy = values
    assert library.he_emulator_configure(order, ctypes.c_uint64(0), policy) != 0


# ---- planted bugs --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bug:
    message: str  # part of what is said when it is noticed
    orders: tuple[str, ...] = ORDERS  # those that notice it
    policies: tuple[str, ...] = ASYNC_POLICIES

    def is_noticed_by(self, schedule: Schedule) -> bool:
        return schedule.order in self.orders and schedule.async_policy in self.policies


BUGS = {
    "missing_barrier_before_read": Bug("wrong answer"),
    # Only a warp that runs far ahead overwrites what the others have yet to read.
    "missing_barrier_before_reuse": Bug("wrong answer", orders=("greedy",)),
    "missing_syncwarp": Bug("nan,"),
    "divergent_barrier": Bug("divergent barrier: thread 0 at __syncthreads (planted_bugs.cu:"),
    "divergent_shuffle": Bug("thread 0 at __shfl_xor_sync mask 0xffffffff (planted_bugs.cu:"),
    "wrong_mask": Bug("the caller is not in its mask"),
    "shuffle_from_outside_the_mask": Bug("reads lane 20, which is not in the mask"),
    "uninitialised_dynamic_shared": Bug("nan,"),
    "uninitialised_static_shared": Bug("nan,"),
    "dynamic_shared_overrun": Bug("wrote byte 128 of 128 bytes of dynamic shared memory"),
    "static_shared_overrun": Bug("array index 32 is out of bounds (planted_bugs.cu:"),
    "misaligned_load": Bug("is not 16-byte aligned (common.cuh:"),
    "too_many_threads": Bug("invalid block (1025, 1, 1)"),
    "too_much_shared_memory": Bug("233472 bytes of dynamic shared memory"),
    "dependence_between_blocks": Bug("wrong answer", orders=("reverse", "random", "greedy")),
    "missing_async_wait": Bug("nan,", policies=("late",)),
    "missing_pipeline_barrier": Bug("wrong answer", orders=("greedy",), policies=("eager",)),
}

every_bug = pytest.mark.parametrize("name", BUGS)


def noticed(library: ctypes.CDLL, path: Path, name: str, broken: bool, schedule: Schedule) -> str:
    message = ctypes.create_string_buffer(512)
    with scheduled(path, schedule):
        library.planted_bug(name.encode(), int(broken), message, len(message))
    return message.value.decode()


@every_bug
def test_planted_bug_is_noticed(library: ctypes.CDLL, library_path: Path, name: str) -> None:
    bug = BUGS[name]
    for schedule in filter(bug.is_noticed_by, EVERY_SCHEDULE):
        message = noticed(library, library_path, name, True, schedule)
        assert bug.message in message, f"under {schedule}"


@every_bug
def test_clean_twin_passes(library: ctypes.CDLL, library_path: Path, name: str) -> None:
    for schedule in EVERY_SCHEDULE:
        assert noticed(library, library_path, name, False, schedule) == "", f"under {schedule}"


# ---- sanitizers ----------------------------------------------------------------------------------


def run_sanitized(program: Path, name: str, broken: bool) -> subprocess.CompletedProcess[str]:
    """In forward order with eager copies, where no missing barrier shows in the answer."""
    options = {
        "ASAN_OPTIONS": "detect_leaks=0",  # a launch that fails abandons its stacks
        "TSAN_OPTIONS": "atexit_sleep_ms=0",
    }
    arguments = [name, str(int(broken)), str(ORDERS.index("forward")), "1"]
    return subprocess.run(
        [str(program), *arguments],
        env={**os.environ, **options},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture(scope="session")
def address_sanitized() -> Path:
    return build_program([*PLANTED, EMULATOR / "sanitizer_main.cu"], ["-fsanitize=address"])


@pytest.fixture(scope="session")
def thread_sanitized() -> Path:
    return build_program([*PLANTED, EMULATOR / "sanitizer_main.cu"], ["-fsanitize=thread"])


def test_address_sanitizer_finds_a_write_out_of_bounds(address_sanitized: Path) -> None:
    report = run_sanitized(address_sanitized, "out_of_bounds_write", broken=True).stderr
    assert "heap-buffer-overflow" in report
    assert "fill_kernel" in report


@pytest.mark.parametrize("name", ["out_of_bounds_write", "missing_pipeline_barrier"])
def test_address_sanitizer_passes_clean_kernels(address_sanitized: Path, name: str) -> None:
    done = run_sanitized(address_sanitized, name, broken=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "right\n", "")


RACES = ["missing_barrier_before_reuse", "missing_syncwarp", "missing_pipeline_barrier"]


@pytest.mark.parametrize("name", RACES)
def test_thread_sanitizer_finds_races(thread_sanitized: Path, name: str) -> None:
    assert "data race" in run_sanitized(thread_sanitized, name, broken=True).stderr


@pytest.mark.parametrize("name", RACES)
def test_thread_sanitizer_passes_clean_kernels(thread_sanitized: Path, name: str) -> None:
    done = run_sanitized(thread_sanitized, name, broken=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "right\n", "")


# ---- the real compiler ---------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_the_same_source_compiles_for_the_gpu(tmp_path: Path) -> None:
    gpus = ("arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a")
    subprocess.run(
        [
            *("nvcc", "-std=c++17", "-O3", f"-I{CSRC}"),
            *(f"-gencode={gpu}" for gpu in gpus),
            *("-c", str(EMULATOR / "self_test.cu"), "-o", str(tmp_path / "self_test.o")),
        ],
        check=True,
        timeout=300,
    )
