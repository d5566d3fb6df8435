"""The decode step on tensors alone, which a CUDA graph can hold: nothing of it asks the host."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hybrid_engine import ops
from hybrid_engine.cache import KVCache
from hybrid_engine.generation.rows import Rows
from hybrid_engine.models import Decoder, DecoderBatch

# Steps between two looks at what has ended; what ends in between is idle for the rest of them.
STEPS_OF_A_POLL = 8


@dataclass
class Results:
    """P responses and, as row P, a place for what is not wanted."""

    tokens: Tensor  # (P + 1, T) int64
    logprobs: Tensor  # (P + 1, T) fp32
    truncated_logprobs: Tensor  # (P + 1, T) fp32
    lengths: Tensor  # (P + 1,) int64

    @classmethod
    def empty(cls, responses: int, tokens: int, device: torch.device) -> Results:
        """Nothing generated yet, for P `responses` of at most T `tokens`."""

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            tokens=zeros(responses + 1, tokens, dtype=torch.int64),
            logprobs=zeros(responses + 1, tokens, dtype=torch.float32),
            truncated_logprobs=zeros(responses + 1, tokens, dtype=torch.float32),
            lengths=zeros(responses + 1, dtype=torch.int64),
        )


class DeviceStep:
    """Advances rows whose sequences go on; the others, and rows past `count`, stay as they are.

    A row goes on while its last token is no stop token, its response is shorter than T, and its
    blocks have room. One whose logits were bad has no last token, see `ops.sample`, and stays too.
    Lengths, stops and draws are tensors, so a step is the same kernels each time.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: KVCache,
        rows: Rows,
        results: Results,
        sampling: tuple[Tensor, ...],
        stop: Tensor,
        *,
        min_new_tokens: int,
    ) -> None:
        """`sampling`: temperature, top_k, top_p, min_p and penalty, (capacity,) each."""
        self._decoder = decoder
        self._cache = cache
        self._rows = rows
        self._results = results
        self._sampling = sampling
        self._stop = stop
        self._min_new_tokens = min_new_tokens
        self.count = torch.zeros((), dtype=torch.int64, device=stop.device)

    @torch.inference_mode()
    def advance(self, bucket: int) -> None:
        """One token for each of the first `bucket` rows that goes on."""
        rows, n = self._rows, bucket
        going = self._going(n)  # (n,) bool
        batch = self._batch(going, n)
        logits = self._logits(self._decoder.hidden_states(batch, self._cache), n)
        temperature, top_k, top_p, min_p, penalty = (t[:n] for t in self._sampling)
        seen = None if rows.seen is None else rows.seen[:n]
        tokens, logprobs, truncated = ops.sample(
            logits, temperature, top_k, top_p, min_p, rows.seeds[:n], rows.steps[:n],
            None if seen is None else penalty, seen,
        )  # fmt: skip
        self._record(going, tokens, logprobs, truncated)
        rows.tokens[:n] = torch.where(going, tokens, rows.tokens[:n])
        rows.lengths[:n] += going
        rows.steps[:n] += going
        if seen is not None:
            place = (rows.numbers[:n], rows.tokens[:n])
            seen[place] = seen[place] | going.to(torch.uint8)

    def _going(self, n: int) -> Tensor:
        rows = self._rows
        stopped = (rows.tokens[:n].unsqueeze(1) == self._stop).any(1) & (rows.steps[:n] > 0)
        stopped |= rows.tokens[:n] < 0
        unfinished = rows.steps[:n] < self._results.tokens.shape[1]
        has_room = rows.lengths[:n] < rows.room[:n]
        return ~stopped & unfinished & has_room & (rows.numbers[:n] < self.count)

    def _batch(self, going: Tensor, n: int) -> DecoderBatch:
        """A row that does not go on stores nothing and has no keys."""
        rows, size = self._rows, self._cache.block_size
        lengths = torch.where(going, rows.lengths[:n], 0)
        block = rows.block_tables[rows.numbers[:n], lengths // size]
        return DecoderBatch(
            tokens=torch.where(going, rows.tokens[:n], 0),
            positions=lengths,
            slot_mapping=torch.where(going, block * size + lengths % size, -1),
            block_tables=rows.block_tables[:n],
            seq_lens=torch.where(going, lengths + 1, 0).int(),
        )

    def _logits(self, hidden: Tensor, n: int) -> Tensor:
        logits = self._decoder.logits(hidden)
        if self._min_new_tokens and len(self._stop):
            early = (self._rows.steps[:n] < self._min_new_tokens).unsqueeze(1)
            logits[:, self._stop] = logits[:, self._stop].masked_fill(early, float("-inf"))
        return logits

    def _record(self, going: Tensor, tokens: Tensor, logprobs: Tensor, truncated: Tensor) -> None:
        results, n = self._results, len(going)
        unwanted = len(results.lengths) - 1
        index = torch.where(going, self._rows.indices[:n], unwanted)
        step = torch.where(going, self._rows.steps[:n], 0)
        results.tokens[index, step] = tokens
        results.logprobs[index, step] = logprobs
        results.truncated_logprobs[index, step] = truncated
        results.lengths[index] = step + 1


def graphs_serve(decoder: Decoder) -> bool:
    """Whether the decoder's steps can be graphs: on CUDA, without collectives of other ranks."""
    return decoder.device.type == "cuda" and not decoder.shared_by_ranks


class GraphedSteps:
    """A CUDA graph of the step for each bucket of rows: powers of two, or all of them.

    The graphs share one pool of memory: they run one after another, and nothing that lies in it is
    read after its step.
    """

    def __init__(self, step: DeviceStep, capacity: int) -> None:
        self._step = step
        self._capacity = capacity
        self._graphs: dict[int, torch.cuda.CUDAGraph | None] = {}

    def run(self, count: int, most: int) -> None:
        """Up to STEPS_OF_A_POLL steps of the first `count` rows, without the host in between."""
        bucket = bucket_of(count, self._capacity)
        if bucket not in self._graphs:
            self._graphs[bucket] = self._capture(bucket)
        self._step.count.fill_(count)
        graph = self._graphs[bucket]
        for _ in range(min(most, STEPS_OF_A_POLL)):
            if graph is None:
                self._step.advance(bucket)
            else:
                graph.replay()

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        """Of the decoder's device, which need not be the current one."""
        return torch.cuda.Stream(self._step.count.device)

    @cached_property
    def _pool(self) -> Any:
        return torch.cuda.graph_pool_handle()

    def _capture(self, bucket: int) -> torch.cuda.CUDAGraph | None:
        """Warm up and record with no row that goes on, so that nothing advances."""
        self._step.count.zero_()
        self._step.advance(bucket)
        graph = torch.cuda.CUDAGraph()
        # By default what other threads do at the time, such as pinning the next batch, is an error.
        place: Any = {"pool": self._pool, "stream": self._stream}
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local", **place):
                self._step.advance(bucket)
        except RuntimeError as error:  # an op that this torch or driver cannot record
            warnings.warn(
                f"decoding without a CUDA graph, slower, because it cannot be recorded: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
            return None
        return graph


def bucket_of(count: int, capacity: int) -> int:
    """The rows that a graph for `count` of them has."""
    return min(1 << (count - 1).bit_length(), capacity)
