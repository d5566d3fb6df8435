"""What only a GPU can show: graphs, offsets past 2^31, the same bits every time.

The tests of the ops and those of test_emulated_*.py run on a GPU by themselves where there is one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hybrid_engine import ops
from hybrid_engine.ops import UnpackEntry, unpack_plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

BF16 = torch.bfloat16


@dataclass(frozen=True)
class Call:
    """An op and how to make its arguments on the device; they are refilled between replays."""

    op: Any
    make: Callable[[], tuple[Any, ...]]
    path: str = ""  # of the launcher, where it has several

    def __str__(self) -> str:
        return f"{self.op.name}{self.path}"


def randn(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(*shape, dtype=dtype, device="cuda")


def rope_args(tokens: int = 33, heads: int = 8, kv_heads: int = 2) -> tuple[Any, ...]:
    angles = randn(64, 64, dtype=torch.float32)
    cache = torch.zeros(tokens // 16 + 1, kv_heads, 16, 128, dtype=BF16, device="cuda")
    places = torch.arange(tokens, device="cuda")
    width = (heads + 2 * kv_heads) * 128
    table = torch.cat((angles.cos(), angles.sin()), -1)
    return (
        randn(tokens, width), None, None, None, table, places % 64, cache, cache.clone(), places,
        heads,
    )  # fmt: skip


def sample_args(rows: int = 9, vocab: int = 32000) -> tuple[Any, ...]:
    def full(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((rows,), value, dtype=dtype, device="cuda")

    places = torch.arange(rows, device="cuda")
    return (
        randn(rows, vocab) * 3, full(0.8), full(50, torch.int64), full(0.9), full(0.01), places,
        places + 7,
    )  # fmt: skip


def gather_args(rows: int = 256, columns: int = 512) -> tuple[Any, ...]:
    partition = rows * columns // 2
    plan = unpack_plan([UnpackEntry(0, partition, rows, columns, 0, 0, 0, rows, 0, columns)])
    return randn(2, partition), plan, [randn(rows, columns)], [], [], []


def paged(batch: int, keys: int, kv_heads: int = 2) -> tuple[Tensor, ...]:
    """Keys, values, block tables in random order and lengths."""
    blocks = -(-keys // 16)
    caches = randn(2, batch * blocks, kv_heads, 16, 128)
    tables = torch.randperm(batch * blocks, device="cuda").int().view(batch, blocks)
    return *caches, tables, torch.full((batch,), keys, dtype=torch.int32, device="cuda")


def decode_args(batch: int = 5, keys: int = 700) -> tuple[Any, ...]:
    return randn(batch, 8, 128), *paged(batch, keys), 0.1


def prefill_args(batch: int = 3, tokens: int = 150) -> tuple[Any, ...]:
    *cache, lengths = paged(batch, tokens)
    bounds = torch.arange(batch + 1, dtype=torch.int32, device="cuda") * tokens
    return randn(batch * tokens, 8, 128), *cache, bounds, lengths, tokens, 0.1


def lora_args(rows: int, out_dim: int = 520, in_dim: int = 512) -> tuple[Any, ...]:
    factors = [randn(8, in_dim)], [randn(out_dim, 8)], [0.5]
    return randn(rows, in_dim), randn(out_dim, in_dim), randn(out_dim), *factors


def masked() -> tuple[Tensor, Tensor]:
    return randn(16, 100, dtype=torch.float32), torch.rand(16, 100, device="cuda") < 0.8


def gae_args() -> tuple[Any, ...]:
    values, mask = masked()
    return randn(16, 100, dtype=torch.float32), values, mask, 0.99, 0.95


CALLS = [
    Call(ops.rms_norm, lambda: (randn(33, 4096), randn(4096), 1e-6)),
    Call(ops.add_rms_norm, lambda: (randn(33, 4096), randn(33, 4096), randn(4096), 1e-6)),
    Call(ops.layer_norm, lambda: (randn(33, 768), randn(768), randn(768), 1e-6)),
    Call(ops.silu_and_mul, lambda: (randn(33, 2048),)),
    Call(ops.bias_gelu, lambda: (randn(33, 1024), randn(1024), True)),
    Call(ops.rope_and_store_kv, rope_args),
    Call(ops.decode_attention, decode_args),
    Call(ops.prefill_attention, prefill_args),
    Call(ops.skinny_linear, lambda: (randn(5, 512), randn(520, 512))),
    Call(ops.fused_lora, lambda: lora_args(7), "-few"),
    Call(ops.fused_lora, lambda: lora_args(40), "-tile64"),
    Call(ops.fused_lora, lambda: lora_args(200), "-tile128"),
    Call(ops.sample, sample_args),
    Call(ops.gather_unpack, gather_args),
    Call(ops.gae, gae_args),
    Call(ops.masked_whiten, masked),
]
calls = pytest.mark.parametrize("call", CALLS, ids=str)


def tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for item in value for t in tensors(item)] if isinstance(value, (tuple, list)) else []


def duplicate(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(duplicate(item) for item in value)
    return value.clone() if isinstance(value, Tensor) else value


@calls
def test_the_native_kernel_serves_cuda_tensors(call: Call) -> None:
    assert call.op.implementation("cuda") == "native", ops.NATIVE.cuda_reason


@calls
def test_replays_in_a_graph(call: Call) -> None:
    """Captured once, replayed on other contents: the bits of an eager call on them."""
    static = call.make()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call.op(*duplicate(static))
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call.op(*static)
    fresh = call.make()
    for place, content in zip(tensors(static), tensors(fresh), strict=True):
        place.copy_(content)
    graph.replay()
    eager = call.op(*fresh)
    for found, expected in zip(tensors(captured), tensors(eager), strict=True):
        assert torch.equal(found, expected)
    for found, expected in zip(tensors(static), tensors(fresh), strict=True):
        assert torch.equal(found, expected), "an argument that the op writes"


@calls
def test_gives_the_same_bits_every_time(call: Call) -> None:
    args = call.make()
    first = tensors(call.op(*duplicate(args)))
    for _ in range(5):
        assert all(map(torch.equal, tensors(call.op(*duplicate(args))), first))


# ---- tensors of more than 2^31 elements ----------------------------------------------------------


@pytest.fixture
def room() -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of device memory")


@pytest.mark.usefixtures("room")
def test_norm_of_many_elements() -> None:
    x, weight = randn(2**19 + 3, 4096), randn(4096)
    out = ops.rms_norm(x, weight, 1e-6)
    assert torch.equal(out[-2:], ops.rms_norm(x[-2:], weight, 1e-6))


@pytest.mark.usefixtures("room")
def test_activation_of_many_elements() -> None:
    x = randn(2**19 + 3, 4096)
    assert torch.equal(ops.silu_and_mul(x)[-2:], ops.silu_and_mul(x[-2:]))
    assert torch.equal(ops.relu(x)[-2:], torch.relu(x[-2:]))


@pytest.mark.usefixtures("room")
def test_rope_of_many_tokens() -> None:
    args = rope_args(tokens=2**21 + 5, heads=6, kv_heads=1)
    q = ops.rope_and_store_kv(*args)
    few = list(args)
    for index in (0, 5, 8):  # qkv, positions, slot_mapping
        few[index] = args[index][-2:]
    stored = args[6].clone()
    assert torch.equal(q[-2:], ops.rope_and_store_kv(*few))
    assert torch.equal(args[6], stored)


@pytest.mark.usefixtures("room")
def test_sampling_of_many_logits() -> None:
    args = sample_args(rows=2**14 + 3, vocab=2**17)
    whole, last = ops.sample(*args), ops.sample(*(arg[-2:] for arg in args))
    assert all(torch.equal(a[-2:], b) for a, b in zip(whole, last, strict=True))


@pytest.mark.usefixtures("room")
def test_gather_of_many_elements() -> None:
    rows, columns = 2**15 + 2, 2**16
    bucket, plan, (out,), *none = gather_args(rows, columns)
    ops.gather_unpack(bucket, plan, [out], *none)
    assert torch.equal(out.view(-1)[-1000:], bucket.view(-1)[-1000:])
    assert torch.equal(out.view(-1)[:1000], bucket.view(-1)[:1000])


@pytest.mark.usefixtures("room")
def test_attention_over_many_cached_elements() -> None:
    """The last sequence reads the last blocks, past 2^31 elements."""
    keys = 2**13
    q, k_cache, v_cache, tables, lengths, scale = decode_args(2**10 + 2, keys)
    assert k_cache.numel() > 2**31
    blocks = keys // 16
    tables[:] = torch.arange(tables.numel(), dtype=torch.int32, device="cuda").view(tables.shape)
    whole = ops.decode_attention(q, k_cache, v_cache, tables, lengths, scale, num_splits=2)
    caches = (cache[-blocks:] for cache in (k_cache, v_cache))
    last = ops.decode_attention(q[-1:], *caches, tables[:1], lengths[-1:], scale, num_splits=2)
    assert torch.equal(whole[-1:], last)


@pytest.mark.usefixtures("room")
@pytest.mark.parametrize("rows", [1, 16])
def test_linear_with_many_weights(rows: int) -> None:
    x, weight = randn(rows, 4096), randn(2**19 + 32, 4096)
    whole, last = ops.skinny_linear(x, weight)[:, -32:], ops.skinny_linear(x, weight[-32:])
    torch.testing.assert_close(whole, last, rtol=1e-2, atol=1e-2)  # other sums of the same terms


@pytest.mark.usefixtures("room")
def test_logprobs_of_many_logits() -> None:
    """2^32 of them, none of which is kept; gradients too."""
    hidden, weight = randn(2**15, 64), randn(2**17, 64)
    targets = torch.randint(2**17, (2**15,), device="cuda")
    few = slice(-200, None)
    found = last = None
    for rows in (slice(None), few):
        part = hidden[rows].clone().requires_grad_()
        logprobs, entropy = ops.linear_logprob(part, weight, targets[rows])
        (gradient,) = torch.autograd.grad((logprobs + entropy).sum(), part)
        found, last = last, (logprobs, entropy, gradient)
    assert found is not None
    assert last is not None
    for whole, alone in zip(found, last, strict=True):
        torch.testing.assert_close(whole[few], alone, rtol=1e-2, atol=1e-3)


def test_tokens_agree_with_the_cpu() -> None:
    """Up to a draw that falls within fp32 rounding of the border between two tokens."""
    args = sample_args(rows=2000, vocab=1000)
    expected = ops.sample(*(arg.cpu() for arg in args))[0]
    assert (ops.sample(*args)[0].cpu() != expected).sum() <= 2
