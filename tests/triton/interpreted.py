"""What only the interpreter can show: guards, bf16, tilings that small shapes do not reach.

Run by test_interpreter.py, in a process where Triton serves the CPU.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from guarded_memory import GUARD, GuardedMemory, guarded
from torch import Tensor

from hybrid_engine import ops
from hybrid_engine.ops.triton import logprob, logprob_backward, logprob_tile


@triton.jit
def shift_kernel(y_ptr, x_ptr, size, load_shift, store_shift, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at + load_shift, mask=at < size, other=0.0)
    tl.store(y_ptr + at + store_shift, x, mask=at < size)


def shifted(x: Tensor, load_shift: int, store_shift: int) -> Tensor:
    y = torch.empty_like(x)
    shift_kernel[(1,)](y, x, x.numel(), load_shift, store_shift, BLOCK=64)
    return y


def test_guards_let_good_kernels_pass() -> None:
    x = torch.randn(50)
    assert torch.equal(guarded(shifted)(x, 0, 0), x)


@pytest.mark.parametrize("load_shift", [0, 20], ids=["numbers", "nan"])
@pytest.mark.parametrize("shift", [-1, 1, 20])
def test_guards_find_stores_outside(shift: int, load_shift: int) -> None:
    with pytest.raises(AssertionError, match="wrote outside"):
        guarded(shifted)(torch.randn(50), load_shift, shift)


@pytest.mark.parametrize("shift", [-1, 1, 20])
def test_guards_turn_loads_outside_into_nan(shift: int) -> None:
    assert guarded(shifted)(torch.randn(50), shift, 0).isnan().any()


@triton.jit
def bf16_kernel(y_ptr, product_ptr, a_ptr, b_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    a, b = tl.load(a_ptr + at), tl.load(b_ptr + at)
    tl.store(y_ptr + at, (a * b + a) / (a - b))
    tl.store(product_ptr + at, tl.dot(a, b))


def test_bf16_is_computed_as_floats() -> None:
    a, b = torch.randn(2, 16, 16).bfloat16()
    y, product = torch.empty_like(a), torch.empty(16, 16)
    bf16_kernel[(1,)](y, product, a, b, BLOCK=16)
    assert torch.equal(y, (a * b + a) / (a - b))
    torch.testing.assert_close(product, a.float() @ b.float())


@triton.jit
def grouped_kernel(visits_ptr, blocks, columns):
    block, column = logprob_tile.grouped(tl.program_id(0).to(tl.int64), blocks, columns)
    tl.atomic_add(visits_ptr + block * columns + column, 1)


@pytest.mark.parametrize("columns", [1, 5])
@pytest.mark.parametrize("blocks", [1, 15, 16, 17, 40])
def test_every_tile_is_visited_once(blocks: int, columns: int) -> None:
    visits = torch.zeros(blocks, columns, dtype=torch.int32)
    grouped_kernel[(blocks * columns,)](visits, blocks, columns)
    assert torch.all(visits == 1)


@pytest.mark.parametrize("programs", [1, 7, 64, 10_000])
@pytest.mark.parametrize("blocks", [1, 3, 100])
@pytest.mark.parametrize("tiles", [1, 8, 1188])
def test_shares_cover_the_vocabulary(tiles: int, blocks: int, programs: int) -> None:
    shares, per_share = logprob.shares_of(tiles, blocks, programs)
    assert (shares - 1) * per_share < tiles <= shares * per_share
    assert shares == 1 or shares * blocks <= programs


def inputs(rows: int, dim: int, vocabulary: int, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return {
        "hidden": torch.randn(rows, dim, generator=generator).to(dtype).requires_grad_(),
        "weight": torch.randn(vocabulary, dim, generator=generator).to(dtype).requires_grad_(),
        "bias": torch.randn(vocabulary, generator=generator).to(dtype).requires_grad_(),
        "targets": torch.randint(vocabulary, (rows,), generator=generator),
    }


def results(leaves: dict[str, Tensor], **options: float) -> list[Tensor]:
    logprobs, entropy = ops.linear_logprob(**leaves, **options)
    wanted = [leaf for leaf in leaves.values() if leaf.requires_grad]
    gradients = torch.autograd.grad((logprobs.sum() + 0.3 * entropy.sum()), wanted)
    return [logprobs.detach(), entropy.detach(), *gradients]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_tiles_of_the_vocabulary_do_not_show(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaves = inputs(70, 24, 300, dtype)
    at_once = results(leaves, softcap=8.0, temperature=0.8)
    monkeypatch.setattr(logprob_backward, "vocabulary_per_tile", lambda rows, vocabulary: 128)
    monkeypatch.setattr(logprob, "multiprocessors", lambda x: 0)  # one share
    for tiled, expected in zip(results(leaves, softcap=8.0, temperature=0.8), at_once, strict=True):
        torch.testing.assert_close(tiled, expected)


def test_shares_of_unlike_size_are_merged() -> None:
    """One share holds all the mass, the others underflow beside it."""
    leaves = inputs(5, 16, 600, torch.float32)
    with torch.no_grad():
        leaves["bias"] -= 500.0 * (torch.arange(600) < 500)
    logits = leaves["hidden"].double() @ leaves["weight"].double().T + leaves["bias"].double()
    logp = logits.log_softmax(-1)
    logprobs, entropy = ops.linear_logprob(**leaves)
    expected = logp.gather(1, leaves["targets"][:, None])[:, 0]
    torch.testing.assert_close(logprobs.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(logp.exp() * logp).sum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", [-1, 40, 2**40])
def test_a_target_outside_the_vocabulary_is_nan(target: int) -> None:
    leaves = inputs(3, 16, 40, torch.float32)
    leaves["targets"][1] = target
    logprobs, entropy = ops.linear_logprob(**leaves)
    assert logprobs.isnan().tolist() == [False, True, False]
    assert entropy.isfinite().all()


@pytest.mark.parametrize("vocabulary", [32_000, 151_936])
@pytest.mark.parametrize("rows", [4096, 65_536])
def test_the_buffer_is_small(rows: int, vocabulary: int) -> None:
    buffer = rows * logprob_backward.vocabulary_per_tile(rows, vocabulary) * 2
    assert buffer <= 0.02 * rows * vocabulary * 4


def test_backward_makes_one_tile_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprob_backward, "vocabulary_per_tile", lambda rows, vocabulary: 128)
    leaves = {name: leaf.detach() for name, leaf in inputs(150, 8, 600, torch.bfloat16).items()}
    arguments = (leaves["hidden"], leaves["weight"], leaves["targets"], leaves["bias"])
    memory = GuardedMemory()
    with memory:
        _, *statistics = logprob.linear_logprob(*arguments, 1.0, 0.0)
        upstream = torch.ones(150), torch.ones(150)
        needs = [True, True, True]
        logprob_backward.linear_logprob_backward(
            needs, *upstream, *arguments, *statistics, 1.0, 0.0
        )
    sizes = [buffer.numel() - 2 * GUARD for buffer, _ in memory.buffers]
    assert max(sizes) == 150 * 128
