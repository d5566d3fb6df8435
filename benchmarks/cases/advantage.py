"""Advantages and whitening over (B, T) with masks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.cases.case import Case, Sweeps, randn, size
from hybrid_engine import ops


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
    return Case("gae", ours, plain, [arrays], size(*arrays, rewards, values), stacked)


def masked_whiten(batch: int, tokens: int, dtype: torch.dtype) -> Case:
    x, _, mask = experience(batch, tokens)

    def plain(x: Tensor, mask: Tensor) -> Tensor:
        count = mask.sum()
        mean = (x * mask).sum() / count
        variance = ((x - mean).square() * mask).sum() / (count - 1)
        return (x - mean) * torch.rsqrt(variance + 1e-8) * mask

    return Case("masked_whiten", ops.masked_whiten, plain, [(x, mask)], 2 * size(x, mask))


SWEEPS: Sweeps = dict.fromkeys((gae, masked_whiten), ((8, 32), (64, 512)))
