"""Every op at decode shapes against the plain PyTorch expression, alternating in one run.

    pytest benchmarks/ops.py            # all, some minutes; -k rms_norm for one op

A case first checks its result against the expression in fp64, and is not timed when it is off.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_engine import ops
from hybrid_engine.cache.pages import empty_pages
from hybrid_engine.ops import UnpackEntry, unpack_plan

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EPS = 1e-5
ROUNDS = 15
ROUND_SECONDS = 2e-3
COLD_BYTES = 800 << 20  # operands of a cold case, all copies: beyond any cache


@dataclass
class Case:
    """One shape of one op. `operands` are tuples of arguments, used in turn."""

    op: str
    name: str
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    operands: list[tuple[Any, ...]]
    bytes: int
    comparable: Callable[[Any, tuple[Any, ...]], Any] = field(default=lambda out, args: out)
    cold: bool = False


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype)


def size(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def copies(bytes_of_one: int, cold: bool) -> int:
    return -(-COLD_BYTES // bytes_of_one) if cold else 1


# ---- norm and activation -------------------------------------------------------------------------


def rms_norm(batch: int, hidden: int, dtype: torch.dtype) -> Case:
    x, weight = randn(batch, hidden, dtype=dtype), randn(hidden, dtype=dtype)
    return Case(
        "rms_norm", "",
        lambda x, w: ops.rms_norm(x, w, EPS),
        lambda x, w: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS) * w,
        [(x, weight)], size(x, weight, x),
    )  # fmt: skip


def add_rms_norm(batch: int, hidden: int, dtype: torch.dtype) -> Case:
    x, residual = randn(batch, hidden, dtype=dtype), torch.zeros(batch, hidden, dtype=dtype)
    weight = randn(hidden, dtype=dtype)

    def plain(x: Tensor, residual: Tensor, w: Tensor) -> Tensor:
        residual.add_(x)
        return residual * torch.rsqrt(residual.pow(2).mean(-1, keepdim=True) + EPS) * w

    def restored(out: Tensor, args: tuple[Any, ...]) -> Tensor:
        args[1].zero_()
        return out

    return Case(
        "add_rms_norm", "", lambda x, r, w: ops.add_rms_norm(x, r, w, EPS), plain,
        [(x, residual, weight)], size(x, residual, residual, weight, x), restored,
    )  # fmt: skip


def layer_norm(batch: int, hidden: int, dtype: torch.dtype) -> Case:
    x, weight, bias = randn(batch, hidden, dtype=dtype), *randn(2, hidden, dtype=dtype)
    return Case(
        "layer_norm", "",
        lambda x, w, b: ops.layer_norm(x, w, b, EPS),
        lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, EPS),
        [(x, weight, bias)], size(x, weight, bias, x),
    )  # fmt: skip


def silu_and_mul(batch: int, hidden: int, dtype: torch.dtype) -> Case:
    x = randn(batch, 2 * (hidden * 8 // 3), dtype=dtype)

    def plain(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    return Case("silu_and_mul", "", ops.silu_and_mul, plain, [(x,)], size(x) * 3 // 2)


def gelu_and_mul(batch: int, hidden: int, dtype: torch.dtype) -> Case:
    x = randn(batch, 2 * (hidden * 8 // 3), dtype=dtype)

    def plain(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return F.gelu(gate, approximate="tanh") * up

    ours = lambda x: ops.gelu_and_mul(x, True)  # noqa: E731
    return Case("gelu_and_mul", "", ours, plain, [(x,)], size(x) * 3 // 2)


def bias_gelu(batch: int, hidden: int, dtype: torch.dtype) -> Case:
    x, bias = randn(batch, 4 * hidden, dtype=dtype), randn(4 * hidden, dtype=dtype)
    return Case(
        "bias_gelu", "", ops.bias_gelu, lambda x, b: F.gelu(x + b), [(x, bias)], size(x, x, bias)
    )


def relu(batch: int, hidden: int, dtype: torch.dtype) -> Case:
    x = randn(batch, 4 * hidden, dtype=dtype)
    return Case("relu", "", ops.relu, F.relu, [(x,)], size(x, x))


# ---- rope and attention --------------------------------------------------------------------------


def heads_of(hidden: int) -> tuple[int, int, int]:
    """Heads, kv heads, head dim of a model of this width."""
    head_dim = 48 if hidden == 288 else 64 if hidden < 2048 else 128
    return hidden // head_dim, max(1, hidden // head_dim // 4), head_dim


def rope_and_store_kv(batch: int, hidden: int, dtype: torch.dtype) -> Case:
    heads, kv_heads, dim = heads_of(hidden)
    qkv = randn(batch, (heads + 2 * kv_heads) * dim, dtype=dtype)
    angles = torch.rand(1024, dim // 2) * 6
    table = torch.cat((angles.cos(), angles.sin()), -1)
    positions = torch.arange(batch) + 100
    caches = torch.zeros(2, batch + 1, kv_heads, 16, dim, dtype=dtype)
    slots = torch.arange(batch) * 16 + 5

    def ours(qkv: Tensor, table: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        return ops.rope_and_store_kv(
            qkv, None, None, None, table, positions, k_cache, v_cache, slots, heads
        )

    def plain(qkv: Tensor, table: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
        q, k, v = qkv.view(batch, -1, dim).split([heads, kv_heads, kv_heads], 1)
        half = table[positions].to(qkv.dtype).unsqueeze(1)
        cos, sin = (torch.cat((x, x), -1) for x in half.chunk(2, -1))

        def turn(x: Tensor) -> Tensor:
            first, second = x.chunk(2, -1)
            return x * cos + torch.cat((-second, first), -1) * sin

        block, offset = slots // 16, slots % 16
        k_cache[block, :, offset] = turn(k)
        v_cache[block, :, offset] = v
        return turn(q)

    return Case(
        "rope_and_store_kv", "", ours, plain, [(qkv, table, *caches)], 2 * size(qkv),
        lambda out, args: torch.cat((out.flatten(), args[2].flatten(), args[3].flatten())),
    )  # fmt: skip


def paged(
    batch: int, kv_heads: int, keys: int, dim: int, dtype: torch.dtype, scattered: bool = True
) -> tuple[Any, ...]:
    blocks = -(-keys // 16)
    shape = (2, batch * blocks, kv_heads, 16, dim)
    caches = empty_pages(shape, dtype=dtype, device=torch.device("cpu")).normal_()
    order = torch.randperm(batch * blocks) if scattered else torch.arange(batch * blocks)
    tables = order.view(batch, blocks).int()
    return *caches, tables, torch.full((batch,), keys, dtype=torch.int32)


def gathered(cache: Tensor, tables: Tensor, keys: int) -> Tensor:
    """(B, K, S, D) from the paged cache."""
    return cache[tables.long()].transpose(1, 2).flatten(2, 3)[:, :, :keys]


def decode_attention(
    batch: int,
    hidden: int,
    dtype: torch.dtype,
    keys: int = 512,
    cold: bool = False,
    scattered: bool = True,
) -> Case:
    heads, kv_heads, dim = heads_of(hidden)
    bytes_of_one = 2 * batch * kv_heads * keys * dim * dtype.itemsize
    operands = [
        (
            randn(batch, heads, dim, dtype=dtype),
            *paged(batch, kv_heads, keys, dim, dtype, scattered),
        )
        for _ in range(copies(bytes_of_one, cold))
    ]

    def ours(q: Tensor, k: Tensor, v: Tensor, tables: Tensor, lengths: Tensor) -> Tensor:
        return ops.decode_attention(q, k, v, tables, lengths, dim**-0.5)

    def plain(q: Tensor, k: Tensor, v: Tensor, tables: Tensor, lengths: Tensor) -> Tensor:
        k, v = gathered(k, tables, keys), gathered(v, tables, keys)
        return F.scaled_dot_product_attention(q.unsqueeze(2), k, v, enable_gqa=True).squeeze(2)

    return Case("decode_attention", f"-S{keys}", ours, plain, operands, bytes_of_one, cold=cold)


def decode_attention_long(batch: int, hidden: int, dtype: torch.dtype) -> Case:
    """Beyond the caches; blocks in order, as a fresh pool gives them to a lone sequence."""
    return decode_attention(batch, hidden, dtype, keys=16384, cold=True, scattered=False)


def decode_attention_scattered(batch: int, hidden: int, dtype: torch.dtype) -> Case:
    """Beyond the caches, blocks in random order."""
    return decode_attention(batch, hidden, dtype, keys=16384, cold=True)


def prefill_attention(batch: int, hidden: int, dtype: torch.dtype) -> Case:
    heads, kv_heads, dim = heads_of(hidden)
    keys = 128
    q = randn(batch * keys, heads, dim, dtype=dtype)
    k_cache, v_cache, tables, lengths = paged(batch, kv_heads, keys, dim, dtype)
    bounds = torch.arange(batch + 1, dtype=torch.int32) * keys

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.prefill_attention(q, k, v, tables, bounds, lengths, keys, dim**-0.5)

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = gathered(k, tables, keys), gathered(v, tables, keys)
        q = q.view(batch, keys, heads, dim).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).reshape(batch * keys, heads, dim)

    return Case(
        "prefill_attention", f"-T{keys}", ours, plain, [(q, k_cache, v_cache)],
        size(q, q, k_cache, v_cache),
    )  # fmt: skip


# ---- sampling ------------------------------------------------------------------------------------


def sampling(name: str, batch: int, vocab: int, dtype: torch.dtype, **filters: float) -> Case:
    """Truth is the log-prob of the tokens that each drew: draws differ, log-probs may not."""
    logits = randn(batch, vocab, dtype=dtype) * 4
    temperature = torch.full((batch,), float(filters.get("temperature", 1.0)))
    top_k = torch.full((batch,), int(filters.get("top_k", 0)))
    top_p = torch.full((batch,), float(filters.get("top_p", 1.0)))
    zeros, seeds = torch.zeros(batch), torch.arange(batch)

    def ours(logits: Tensor) -> tuple[Tensor, ...]:
        return ops.sample(logits, temperature, top_k, top_p, zeros, seeds, seeds)

    def plain(logits: Tensor) -> tuple[Tensor, ...]:
        logprobs = torch.log_softmax(logits.float(), -1)
        if name == "greedy":
            tokens = logits.argmax(-1)
            return tokens, logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)
        kept = logits.float()
        if "top_k" in filters:
            least = kept.topk(int(filters["top_k"])).values[:, -1:]
            kept = kept.masked_fill(kept < least, -torch.inf)
        if "top_p" in filters:
            ranked, order = kept.sort(-1, descending=True)
            mass = torch.softmax(ranked, -1).cumsum(-1)
            out = (mass - torch.softmax(ranked, -1)) > filters["top_p"]
            kept = kept.masked_fill(out.scatter(1, order, out), -torch.inf)
        tokens = torch.multinomial(torch.softmax(kept, -1), 1)
        truncated = torch.log_softmax(kept, -1).gather(1, tokens).squeeze(1)
        return tokens.squeeze(1), logprobs.gather(1, tokens).squeeze(1), truncated

    def error(out: tuple[Tensor, ...], args: tuple[Any, ...]) -> Tensor:
        truth = torch.log_softmax(args[0].double(), -1).gather(1, out[0].unsqueeze(1)).squeeze(1)
        return (out[1] - truth).abs() < 1e-5

    return Case("sample", f"-{name}", ours, plain, [(logits,)], size(logits), error)


def sample_greedy(batch: int, vocab: int, dtype: torch.dtype) -> Case:
    return sampling("greedy", batch, vocab, dtype, temperature=0.0)


def sample_full(batch: int, vocab: int, dtype: torch.dtype) -> Case:
    return sampling("full", batch, vocab, dtype)


def sample_top(batch: int, vocab: int, dtype: torch.dtype) -> Case:
    return sampling("top", batch, vocab, dtype, top_k=50, top_p=0.9)


# ---- linear --------------------------------------------------------------------------------------


def skinny_linear(batch: int, hidden: int, dtype: torch.dtype) -> Case:
    weight_bytes = hidden * hidden * dtype.itemsize
    cold = hidden >= 4096
    operands = [
        (randn(batch, hidden, dtype=dtype), randn(hidden, hidden, dtype=dtype))
        for _ in range(copies(weight_bytes, cold))
    ]
    return Case("skinny_linear", "", ops.skinny_linear, F.linear, operands, weight_bytes, cold=cold)


def fused_lora(batch: int, hidden: int, dtype: torch.dtype) -> Case:
    x, weight = randn(batch, hidden, dtype=dtype), randn(hidden, hidden, dtype=dtype)
    a, b = randn(16, hidden, dtype=dtype), randn(hidden, 16, dtype=dtype)

    def ours(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return ops.fused_lora(x, weight, None, [a], [b], [2.0])

    def plain(x: Tensor, weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, weight) + F.linear(F.linear(x, a), b) * 2.0

    return Case("fused_lora", "-r16", ours, plain, [(x, weight, a, b)], size(weight, a, b))


# ---- gather and advantages -----------------------------------------------------------------------


def gather_unpack(batch: int, hidden: int, dtype: torch.dtype) -> Case:
    """One Llama layer, gathered from `batch` ranks, to fused QKV and gate-up in bf16."""
    kv, inner = hidden // 4, hidden * 8 // 3
    shapes = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
    places = [(0, 0), (0, hidden), (0, hidden + kv), (1, 0), (2, 0), (2, inner), (3, 0)]
    outs = [
        torch.zeros(rows, columns, dtype=torch.bfloat16)
        for rows, columns in ((hidden + 2 * kv, hidden), shapes[3], (2 * inner, hidden), shapes[6])
    ]
    entries, source = [], 0
    for (rows, columns), (destination, row) in zip(shapes, places, strict=True):
        partition = -(-rows * columns // batch)
        entries.append(
            UnpackEntry(source, partition, rows, columns, destination, row, 0, rows, 0, columns)
        )
        source += partition
    bucket, plan = randn(batch, source, dtype=dtype), unpack_plan(entries)

    def ours(bucket: Tensor, *outs: Tensor) -> None:
        ops.gather_unpack(bucket, plan, list(outs), [], [], [])

    def plain(bucket: Tensor, *outs: Tensor) -> None:
        full = []
        for e in entries:
            flat = bucket[:, e.source : e.source + e.partition].reshape(-1)
            full.append(flat[: e.rows * e.columns].view(e.rows, e.columns))
        outs[0].copy_(torch.cat(full[:3]))
        outs[1].copy_(full[3])
        outs[2].copy_(torch.cat(full[4:6]))
        outs[3].copy_(full[6])

    return Case(
        "gather_unpack", "", ours, plain, [(bucket, *outs)], size(bucket, *outs),
        lambda out, args: torch.cat([x.flatten() for x in args[1:]]),
    )  # fmt: skip


def experience(batch: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (batch, 1))
    return randn(batch, tokens), randn(batch, tokens), mask


def gae(batch: int, tokens: int, dtype: torch.dtype) -> Case:
    rewards, values, mask = experience(batch, tokens)

    def plain(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        rewards, values = rewards * mask, values * mask
        last, out = torch.zeros_like(rewards[:, 0]), []
        for t in reversed(range(tokens)):
            later = values[:, t + 1] if t + 1 < tokens else 0.0
            last = rewards[:, t] + 0.99 * later - values[:, t] + 0.99 * 0.95 * last
            out.append(last)
        advantages = torch.stack(out[::-1], 1) * mask
        return torch.stack((advantages, advantages + values))

    def ours(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        return ops.gae(rewards, values, mask, 0.99, 0.95)

    def stacked(out: Any, args: tuple[Any, ...]) -> Tensor:
        return torch.stack(tuple(out))

    arrays = (rewards, values, mask)
    return Case("gae", "", ours, plain, [arrays], size(*arrays, rewards, values), stacked)


def masked_whiten(batch: int, tokens: int, dtype: torch.dtype) -> Case:
    x, _, mask = experience(batch, tokens)

    def plain(x: Tensor, mask: Tensor) -> Tensor:
        count = mask.sum()
        mean = (x * mask).sum() / count
        variance = ((x - mean).square() * mask).sum() / (count - 1)
        return (x - mean) * torch.rsqrt(variance + 1e-8) * mask

    return Case("masked_whiten", "", ops.masked_whiten, plain, [(x, mask)], 2 * size(x, mask))


# ---- the run -------------------------------------------------------------------------------------

BATCHES, HIDDEN = (1, 8, 32), (288, 1024, 4096)
SWEEPS: dict[Callable[..., Case], tuple[tuple[int, ...], tuple[int, ...]]] = {
    rms_norm: (BATCHES, HIDDEN),
    add_rms_norm: (BATCHES, HIDDEN),
    layer_norm: (BATCHES, HIDDEN),
    silu_and_mul: (BATCHES, HIDDEN),
    gelu_and_mul: (BATCHES, HIDDEN),
    bias_gelu: (BATCHES, HIDDEN),
    relu: (BATCHES, HIDDEN),
    rope_and_store_kv: (BATCHES, HIDDEN),
    decode_attention: (BATCHES, HIDDEN),
    decode_attention_long: ((1,), (4096,)),
    decode_attention_scattered: ((1,), (4096,)),
    prefill_attention: ((1, 8), (288, 1024)),
    sample_greedy: (BATCHES, (32000,)),
    sample_full: (BATCHES, (32000,)),
    sample_top: (BATCHES, (32000,)),
    skinny_linear: ((1, 8, 16), HIDDEN),
    fused_lora: (BATCHES, HIDDEN),
    gather_unpack: ((8,), (288, 1024)),
    gae: ((8, 32), (64, 512)),
    masked_whiten: ((8, 32), (64, 512)),
}
FP32_ONLY = (gae, masked_whiten)
SIZE_LETTER = {sample_greedy: "V", sample_full: "V", sample_top: "V", gae: "T", masked_whiten: "T"}


def parameters() -> list[Any]:
    return [
        pytest.param(
            make, batch, width, dtype, id=f"{make.__name__}-B{batch}-{letter}{width}-{name}"
        )
        for make, (batches, widths) in SWEEPS.items()
        for letter in (SIZE_LETTER.get(make, "D"),)
        for width in widths
        for batch in batches
        for name, dtype in DTYPES.items()
        if dtype == torch.float32 or make not in FP32_ONLY
    ]


def widened(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args)


def copied(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(x.clone() if isinstance(x, Tensor) else x for x in args)


def assert_correct(case: Case) -> None:
    """At most twice the error of the expression, or one rounding of the largest result."""
    results = []
    for function, prepare in ((case.ours, copied), (case.plain, copied), (case.plain, widened)):
        args = prepare(case.operands[0])
        results.append(case.comparable(function(*args), args))
    ours, plain, truth = results
    if ours.dtype == torch.bool:
        assert ours.all()
        return
    error, allowed = ((x.double() - truth).abs().max().item() for x in (ours, plain))
    rounding = torch.finfo(ours.dtype).eps * truth.abs().max().item()
    assert error <= max(2 * allowed, rounding), f"{case.op}: error {error:.3g}, torch {allowed:.3g}"


def clock() -> float:
    """Seconds; with one thread those of its processor, which a busy machine does not inflate."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


class Timer:
    """Seconds a call, over rounds of as many calls as make a round long enough to time."""

    def __init__(self, function: Callable[..., Any], operands: list[tuple[Any, ...]]) -> None:
        self.function, self.operands, self.place, self.samples = function, operands, 0, []
        self.calls = 1
        while (seconds := self.round()) < ROUND_SECONDS:
            self.calls = max(2 * self.calls, int(self.calls * ROUND_SECONDS / (seconds + 1e-9)))
            self.calls = min(self.calls, 4096)
            if self.calls == 4096:
                break
        self.samples: list[float] = []

    def round(self) -> float:
        start = clock()
        for _ in range(self.calls):
            self.function(*self.operands[self.place])
            self.place = (self.place + 1) % len(self.operands)
        elapsed = clock() - start
        self.samples.append(elapsed / self.calls)
        return elapsed

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


@pytest.mark.parametrize(("make", "batch", "width", "dtype"), parameters())
def test_op(benchmark: Any, make: Any, batch: int, width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    with torch.inference_mode():  # as rollouts run
        measure(benchmark, make(batch, width, dtype))


def measure(benchmark: Any, case: Case) -> None:
    assert_correct(case)
    ours, plain = Timer(case.ours, case.operands), Timer(case.plain, case.operands)
    # The baseline's round is the set-up of each of ours, so that the two alternate.
    benchmark.pedantic(ours.round, setup=lambda: plain.round() and None, rounds=ROUNDS)
    low, high = statistics.quantiles(ours.samples, n=4)[::2]
    benchmark.extra_info.update(
        op=case.op,
        ours_us=1e6 * ours.median,
        spread_us=1e6 * (high - low) / 2,
        baseline_us=1e6 * plain.median,
        bytes=case.bytes,
        cold=case.cold,
    )
