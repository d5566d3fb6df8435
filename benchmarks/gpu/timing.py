"""Device time of a function, without the cost of launching it, and a check before it is timed."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ROUNDS = 20
GRAPH_SECONDS = 3e-3  # device time of one round: long against an event's resolution
COPY_BYTES = 2 << 30  # beyond any L2 cache


def captured(function: Callable[[], Any], calls: int) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return graph


def replay_seconds(graph: torch.cuda.CUDAGraph) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    graph.replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def graph_of(function: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, int]:
    """A graph of about GRAPH_SECONDS, and how many calls it holds."""
    single = captured(function, 1)
    seconds = min(replay_seconds(single) for _ in range(3))
    calls = max(1, min(200, round(GRAPH_SECONDS / seconds)))
    return (captured(function, calls), calls) if calls > 1 else (single, 1)


def alternate(*functions: Callable[[], Any]) -> list[tuple[float, float]]:
    """Median and half the interquartile range, in seconds, of each, in alternating rounds."""
    graphs = [graph_of(function) for function in functions]
    samples: list[list[float]] = [[] for _ in functions]
    for _ in range(ROUNDS):
        for (graph, calls), seconds in zip(graphs, samples, strict=True):
            seconds.append(replay_seconds(graph) / calls)
    return [_median_and_spread(seconds) for seconds in samples]


def _median_and_spread(seconds: list[float]) -> tuple[float, float]:
    low, median, high = statistics.quantiles(seconds, n=4)
    return median, (high - low) / 2


def copy_bandwidth() -> float:
    """GB/s, read and written together, of torch's copy of a tensor beyond the L2 cache."""
    source = torch.zeros(COPY_BYTES // 2, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    ((seconds, _),) = alternate(lambda: target.copy_(source))
    return 2 * COPY_BYTES / seconds / 1e9


def error_and_bound(found: Tensor, baseline: Tensor, truth: Tensor) -> tuple[float, float]:
    """Largest error of a result, and what it may be: twice the baseline's, or one rounding."""
    truth = truth.float()
    bound = 2 * (baseline.float() - truth).abs().amax().item()
    rounding = torch.finfo(found.dtype).eps * truth.abs().amax().item()
    return (found.float() - truth).abs().amax().item(), max(bound, rounding)
