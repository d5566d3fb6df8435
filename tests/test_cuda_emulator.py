"""Each function of the CUDA emulator gives what the CUDA and PTX manuals say."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
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
    scheduled,
    why_unavailable,
)

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=str(why_unavailable()))

EVERY_SCHEDULE = [Schedule(order, policy, seed=1) for order in ORDERS for policy in ASYNC_POLICIES]
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # he::DType
WARP = 32

every_schedule = pytest.mark.parametrize("schedule", EVERY_SCHEDULE, ids=str)
half_types = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])


@pytest.fixture(scope="session")
def library_path() -> Path:
    return build_emulated([EMULATOR / "self_test.cu"])


@pytest.fixture(scope="session")
def library(library_path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(library_path))


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def ints(*shape: int) -> torch.Tensor:
    return torch.full(shape, -1, dtype=torch.int32)


def as_int32(bits: int) -> int:
    return bits - 2**32 if bits >= 2**31 else bits


# ---- what each function gives --------------------------------------------------------------------


@every_schedule
def test_collectives(library: ctypes.CDLL, library_path: Path, schedule: Schedule) -> None:
    out = ints(20, WARP)
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
        [6] * WARP,  # __reduce_and_sync
        [6] * WARP,  # __reduce_or_sync
        [-1] * WARP,  # __reduce_xor_sync: every bit once
        [as_int32(0x00010001 << lane % 16) for lane in lanes],  # __match_any_sync
        [7] * WARP,  # twice the float 3.5 of lane 3
        [4] * WARP,  # a bfloat16
    ]
    assert out.tolist() == expected


@every_schedule
def test_lanes_that_met_before_meet_the_rest(
    library: ctypes.CDLL, library_path: Path, schedule: Schedule
) -> None:
    out = ints(3, WARP)
    with scheduled(library_path, schedule):
        library.partial_masks(pointer(out))
    assert out[0].tolist() == [lane ^ 1 if lane < 16 else lane for lane in range(WARP)]
    assert out[1].tolist() == [lane ^ 16 for lane in range(WARP)]
    assert out[2].tolist() == [2, 2, 2, *range(3, WARP)]


def test_functions_of_bits(library: ctypes.CDLL) -> None:
    x, y = 0x00F0F0C0, 0x7ACE1234
    wide = x << 32 | y
    out = torch.zeros(13, dtype=torch.int64)
    library.bits(pointer(out), x, y)
    assert out.tolist() == [
        x.bit_count(),
        wide.bit_count(),
        32 - x.bit_length(),
        64 - y.bit_length(),
        7,  # the lowest one of x is bit 6; __ffs counts from 1
        3,
        x * y >> 32,
        wide * wide >> 64,
        x,
        y,
        wide,
        x,
        y,
    ]


def test_every_atomic(library: ctypes.CDLL) -> None:
    out = ints(8)
    library.atomic_kinds(pointer(out))
    # Above its limit of 10, atomicInc starts over at 0 and atomicDec at the limit.
    assert out.tolist() == [12 - 10, 10, 12 & 10, 12 | 10, 12 ^ 10, 0, 10, 10]


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


# ---- the real compiler ---------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_the_same_source_compiles_for_the_gpu(tmp_path: Path) -> None:
    gpus = ("arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a")
    subprocess.run(
        [
            *("nvcc", "-std=c++17", "-O3", "-DHE_DEVICE=cuda", f"-I{CSRC}"),
            *(f"-gencode={gpu}" for gpu in gpus),
            *("-c", str(EMULATOR / "self_test.cu"), "-o", str(tmp_path / "self_test.o")),
        ],
        check=True,
        timeout=300,
    )
