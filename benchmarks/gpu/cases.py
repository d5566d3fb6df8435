"""The ops of a decode step that read no weights, and those between rollout and update."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu.case import (
    BF16,
    BLOCK,
    EPS,
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    Case,
    Place,
    joined,
    size,
)  # fmt: skip
from hybrid_engine import ops
from hybrid_engine.ops import UnpackEntry, unpack_plan

# ---- norm and activation -------------------------------------------------------------------------


def norms(at: Place) -> Iterator[Case]:
    for label, rows, large in at.shapes():
        x, weight, bias = at.randn(rows, at.size(HIDDEN)), *at.randn(2, at.size(HIDDEN))
        yield Case(
            ops.rms_norm, label, lambda x, w: ops.rms_norm(x, w, EPS),
            lambda x, w: F.rms_norm(x, x.shape[-1:], w, EPS), (x, weight), 2 * size(x), large,
        )  # fmt: skip
        yield Case(
            ops.layer_norm, label, lambda x, w, b: ops.layer_norm(x, w, b, EPS),
            lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, EPS), (x, weight, bias),
            2 * size(x), large,
        )  # fmt: skip
        # The residual grows by x at every call, so its norm is always that of x.
        steps = torch.zeros_like(x)
        steps[:, ::2] = 1.0
        yield Case(
            ops.add_rms_norm, label, lambda x, r, w: ops.add_rms_norm(x, r, w, 0.0),
            lambda x, r, w: F.rms_norm(r.add_(x), x.shape[-1:], w, 0.0),
            (steps, torch.zeros_like(x), weight), 4 * size(x), large,
        )  # fmt: skip


def plain_silu_and_mul(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


def activations(at: Place) -> Iterator[Case]:
    for label, rows, large in at.shapes():
        width = 2 * at.size(HIDDEN)
        x, bias = at.randn(rows, width), at.randn(width)
        yield Case(
            ops.silu_and_mul, label, ops.silu_and_mul, plain_silu_and_mul, (x,),
            size(x) * 3 // 2, large,
        )  # fmt: skip
        yield Case(
            ops.bias_gelu, label, ops.bias_gelu, lambda x, b: F.gelu(x + b), (x, bias),
            2 * size(x), large,
        )  # fmt: skip


# ---- rope ----------------------------------------------------------------------------------------

POSITIONS = 4096


def ropes(at: Place) -> Iterator[Case]:
    for label, tokens, large in at.shapes():
        qkv = at.randn(tokens, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        angles = torch.rand(POSITIONS, HEAD_DIM // 2, device=at.device) * 6
        table = torch.cat((angles.cos(), angles.sin()), -1)
        slots = torch.randperm(tokens, device=at.device)
        blocks = -(-tokens // BLOCK)
        caches = torch.zeros(2, blocks, KV_HEADS, BLOCK, HEAD_DIM, dtype=BF16, device=at.device)
        yield Case(
            ops.rope_and_store_kv, label, rope, plain_rope,
            (qkv, table, slots % POSITIONS, slots, *caches), 2 * size(qkv), large,
        )  # fmt: skip


def rope(
    qkv: Tensor, table: Tensor, positions: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    return ops.rope_and_store_kv(
        qkv, None, None, None, table, positions, k_cache, v_cache, slots, HEADS
    )


def plain_rope(
    qkv: Tensor, table: Tensor, positions: Tensor, slots: Tensor, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    q, k, v = qkv.view(len(qkv), -1, HEAD_DIM).split([HEADS, KV_HEADS, KV_HEADS], 1)
    half = table[positions].to(qkv.dtype).unsqueeze(1)
    cos, sin = (torch.cat((x, x), -1) for x in half.chunk(2, -1))

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat((-second, first), -1) * sin

    for cache, rows in ((k_cache, turn(k)), (v_cache, v)):
        cache[slots // BLOCK, :, slots % BLOCK] = rows
    return turn(q)


# ---- sampling ------------------------------------------------------------------------------------


class SampleCase(Case):
    """Draws differ between the two, so what must agree is the log-prob of our own tokens."""

    def check(self) -> tuple[float, float]:
        (logits,) = self.args
        tokens, logprobs, _ = self.ours(logits)
        truth = torch.log_softmax(logits.double(), -1).gather(1, tokens.unsqueeze(1)).squeeze(1)
        return (logprobs - truth).abs().amax().item(), 4 * torch.finfo(torch.float32).eps * 16


def samples(at: Place) -> Iterator[Case]:
    for rows in (1, 64):
        for name, top_k, top_p in (("full", 0, 1.0), ("top", 50, 0.9)):
            logits, places = at.randn(rows, at.size(128256)) * 3, at.arange(rows)
            ones, kept = torch.ones(rows, device=at.device), torch.full_like(places, top_k)
            settings = (ones, kept, ones * top_p, ones * 0, places, places)
            yield SampleCase(
                ops.sample, f"{name}-B{rows}", lambda x, s=settings: ops.sample(x, *s),
                lambda x, k=top_k, p=top_p: plain_sample(x, k, p), (logits,), size(logits),
            )  # fmt: skip


def plain_sample(logits: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    wide = logits.float()
    logprobs = torch.log_softmax(wide, -1)
    if top_k:
        wide = wide.masked_fill(wide < wide.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        ranked, order = torch.softmax(wide, -1).sort(-1, descending=True)
        out = ranked.cumsum(-1) - ranked > top_p
        wide = wide.masked_fill(torch.zeros_like(out).scatter(1, order, out), -torch.inf)
    probabilities = torch.softmax(wide, -1)
    tokens = (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)
    return tokens, logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)


# ---- gather and advantages -----------------------------------------------------------------------


def gathers(at: Place) -> Iterator[Case]:
    """One Llama-7B layer of 8 ranks: QKV and gate-up fused."""
    hidden, inner, world = at.size(HIDDEN), at.size(11008), 8
    shapes = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]
    places = [(0, 0), (0, hidden), (0, 2 * hidden), (1, 0), (2, 0), (2, inner), (3, 0)]
    entries, source = [], 0
    for (rows, columns), (destination, row) in zip(shapes, places, strict=True):
        partition = rows * columns // world
        entries.append(
            UnpackEntry(source, partition, rows, columns, destination, row, 0, rows, 0, columns)
        )
        source += partition
    bucket, plan = at.randn(world, source), unpack_plan(entries)
    fused = ((3 * hidden, hidden), shapes[3], (2 * inner, hidden), shapes[6])
    outs = [torch.zeros(shape, dtype=BF16, device=at.device) for shape in fused]

    def ours(bucket: Tensor, *outs: Tensor) -> tuple[Tensor, ...]:
        ops.gather_unpack(bucket, plan, list(outs), [], [], [])
        return outs

    def plain(bucket: Tensor, *outs: Tensor) -> tuple[Tensor, ...]:
        full = [
            bucket[:, e.source : e.source + e.partition].reshape(e.rows, e.columns) for e in entries
        ]
        for out, parts in zip(outs, (full[:3], full[3:4], full[4:6], full[6:]), strict=True):
            torch.cat(parts, out=out)
        return outs

    yield Case(
        ops.gather_unpack, "llama7b-layer-W8", ours, plain, (bucket, *outs), 2 * size(bucket), True,
        result=joined,
    )  # fmt: skip


def advantages(at: Place) -> Iterator[Case]:
    rows, length = at.size(512), at.size(512)
    rewards, values = torch.randn(2, rows, length, device=at.device)
    ends = torch.randint(1, length + 1, (rows, 1), device=at.device)
    mask = at.arange(length) < ends

    def plain(rewards: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        rewards, values = rewards * mask, values * mask
        later, last, out = *torch.zeros_like(rewards[:, :2]).unbind(1), []
        for t in reversed(range(length)):
            last = rewards[:, t] + 0.99 * later - values[:, t] + 0.99 * 0.95 * last
            later = values[:, t]
            out.append(last)
        return torch.stack(out[::-1], 1) * mask

    yield Case(
        ops.gae, f"B{rows}-T{length}", lambda r, v, m: ops.gae(r, v, m, 0.99, 0.95)[0], plain,
        (rewards, values, mask), size(rewards, values, mask, rewards, values),
    )  # fmt: skip


FAMILIES = (norms, activations, ropes, samples, gathers, advantages)
