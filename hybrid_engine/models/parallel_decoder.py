"""The decoder of ranks that generate together: tensor parallel, streamed layers, or both."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hybrid_engine.cache import KVCache
from hybrid_engine.models.decoder import Decoder, DecoderBatch, alibi_slopes
from hybrid_engine.models.parts import DecoderLayer, Linear
from hybrid_engine.models.rollout_copy import RolloutCopy
from hybrid_engine.parallel import Lockstep, TensorParallel
from hybrid_engine.weights import LayerStream

Collective = Callable[[], object]


class ParallelDecoder(Decoder):
    """A decoder whose passes contain collectives, so that every rank has to make them.

    Tensor parallel, a rank has some heads, some of the MLP and some of the vocabulary; sums over
    the ranks follow the embedding, the attention output and the MLP, and the logits are
    concatenated, so that each rank has them all and samples the same tokens. Streamed, each layer
    is gathered before it is computed.
    """

    def __init__(
        self,
        copy: RolloutCopy,
        *,
        peers: Lockstep | None,
        streamers: Lockstep | None,
        owed: deque[Collective],
    ) -> None:
        """`peers` share a copy and have the same work; `streamers` meet in every layer."""
        self._copy = copy
        self._tp: TensorParallel | None = copy.parallel
        self._peers = peers
        self._streamers = streamers
        self._owed = owed
        self.stream: LayerStream | None = None  # of the rollout that goes on
        super().__init__(copy.model, copy.family)

    @property
    def shared_by_ranks(self) -> bool:
        return True

    @property
    def vocab_size(self) -> int:
        return self._copy.vocab_size

    @property
    def embedded_tokens(self) -> int:
        return self._copy.embedded_tokens

    def hidden_states(
        self,
        batch: DecoderBatch,
        cache: KVCache,
        on_layer: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        if self._peers:
            self._peers.begin()
        if self._streamers:
            self._streamers.begin()
        self._owed.extend(self._collectives(len(batch.tokens)))
        return super().hidden_states(batch, cache, on_layer)

    def logits(self, hidden: Tensor) -> Tensor:
        if self._peers:
            self._peers.begin()
        return super().logits(hidden)

    def skip_pass(self) -> None:
        """Take part in a pass of other ranks."""
        for collective in self._copy.layer_collectives():
            collective()

    def _collectives(self, tokens: int) -> list[Collective]:
        """What would stand in for each of a pass, in order."""
        gathers = list(self._copy.layer_collectives()) if self.stream else []
        sums: list[Collective] = []
        if self._tp:
            parallel, width = self._tp, self.embedding.weight.shape[1]
            zeros = torch.zeros(tokens, width, dtype=self.dtype, device=self.device)
            sums = [lambda: parallel.sum(zeros)]
        owed = sums + gathers[:2]
        for layer in range(self.num_layers):
            owed += sums * 2 + gathers[layer + 2 : layer + 3]
        return owed

    def _resolve(self) -> None:
        super()._resolve()
        if self._tp:
            for layer in self.layers:
                layer.attention_output = _Summed(layer.attention_output, self._sum)
                layer.mlp_down = _Summed(layer.mlp_down, self._sum)
            self.head = _Concatenated(self.head, self._concatenate)

    def _enter(self, layer: int) -> DecoderLayer:
        if self.stream:
            self.stream.enter(layer)
        return self.layers[layer]

    def _look_up(self, tokens: Tensor) -> Tensor:
        if self._tp is None:
            return super()._look_up(tokens)
        first, end = self._tp.share(self.vocab_size)
        mine = (tokens >= first) & (tokens < end)
        rows = F.embedding(torch.where(mine, tokens - first, 0), self.embedding.weight)
        return self._sum(rows.masked_fill(~mine.unsqueeze(1), 0))

    def _slopes(self) -> Tensor:
        if self._tp is None:
            return super()._slopes()
        slopes = alibi_slopes(self.num_heads * self._tp.size)
        first, end = self._tp.share(len(slopes))
        return slopes[first:end]

    def _sum(self, x: Tensor) -> Tensor:
        assert self._tp is not None
        self._owed.popleft()
        return self._tp.sum(x)

    def _concatenate(self, logits: Tensor) -> Tensor:
        """(N, this rank's part of the vocabulary) -> (N, V)"""
        assert self._tp is not None
        return self._tp.concatenate(logits)[:, : self.vocab_size].contiguous()


class _Joint(Linear):
    """A linear layer of which every rank has a part."""

    def __init__(self, part: Linear, join: Callable[[Tensor], Tensor]) -> None:
        self._part = part
        self._join = join

    def refresh(self) -> None:
        self._part.refresh()

    def release(self) -> None:
        self._part.release()

    @property
    def weight(self) -> Tensor:
        return self._part.weight

    @property
    def bias(self) -> Tensor | None:
        return self._part.bias


class _Summed(_Joint):
    """Every rank has some inputs. The bias is added once, to the sum."""

    def __call__(self, x: Tensor) -> Tensor:
        out = self._join(self._part.product(x))
        return out if self.bias is None else out.add_(self.bias)


class _Concatenated(_Joint):
    """Every rank has some outputs."""

    def __call__(self, x: Tensor) -> Tensor:
        return self._join(self._part(x))
