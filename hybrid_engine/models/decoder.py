"""The forward pass of rollout: packed tokens, paged cache, fused ops, on the live weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid_engine import ops
from hybrid_engine.cache import KVCache
from hybrid_engine.models.family import Family
from hybrid_engine.models.parts import (
    DecoderLayer,
    Linear,
    Norm,
    activation,
    activation_kind,
    finder,
    norm_eps,
    plain,
)


@dataclass
class DecoderBatch:
    """N packed tokens of B sequences: a prefill, or with `cu_seqlens` None one token each."""

    tokens: Tensor  # (N,) int64
    positions: Tensor  # (N,) int64
    slot_mapping: Tensor  # (N,) int64, where each token's key and value go
    block_tables: Tensor  # (B, max_blocks) int32
    seq_lens: Tensor  # (B,) int32, cached tokens, these included
    cu_seqlens: Tensor | None = None  # (B + 1,) int32
    max_query_len: int = 1


class Decoder:
    """Runs an HF causal language model of a known family without its own forward."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        config: Any = model.config
        self.num_heads: int = config.num_attention_heads
        self.kv_heads: int = getattr(config, "num_key_value_heads", None) or self.num_heads
        self.head_dim: int = (
            getattr(config, "head_dim", None) or config.hidden_size // self.num_heads
        )
        # ALiBi has no last position.
        self.max_positions: int = getattr(config, "max_position_embeddings", 2**31)
        self._model: Any = model
        self.config = config
        self.family = family
        scalar = family.query_scalar(config) if family.query_scalar else self.head_dim
        self.scale = scalar**-0.5
        self.attention_softcap = _attention_softcap(config)
        self._final_softcap: float = getattr(config, "final_logit_softcapping", None) or 0.0
        gated = len(family.mlp_up) == 2
        self.activation = activation_kind(family.activation(config), gated=gated)
        self._activate = activation(self.activation, gated=gated)
        self.parallel_residual = bool(family.parallel_residual and family.parallel_residual(config))
        self.cos_sin: Tensor | None = None
        self.alibi_slopes: Tensor | None = None
        self._resolve()

    @property
    def shared_by_ranks(self) -> bool:
        """Whether other ranks have to take part in a pass."""
        return False

    @property
    def _linears(self) -> list[Linear]:
        return [self.head, *(linear for layer in self.layers for linear in layer.linears)]

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def vocab_size(self) -> int:
        return self.head.weight.shape[0]

    @property
    def embedded_tokens(self) -> int:
        """Rows of the embedding; a head may have more."""
        return self.embedding.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.weight.device

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Of the modules that are read."""
        return self._model.named_parameters()

    def refresh(self) -> None:
        """See the modules and parameters as they are now. Call before a rollout."""
        if structure(self._model) != self._structure:  # an adapter, a resized embedding
            self.release()  # what the new parts find fused, they would never give back
            self._resolve()
        for linear in self._linears:
            linear.refresh()
        if self._rotary is not None:
            self.cos_sin = self._rotary_table()
        if self.family.alibi:
            self.alibi_slopes = self._slopes().to(self.device)

    def release(self) -> None:
        """Leave the model's parameters as if the decoder had never been there."""
        for linear in self._linears:
            linear.release()

    def hidden_states(
        self,
        batch: DecoderBatch,
        cache: KVCache,
        on_layer: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """(N, D): the last hidden states, after the final norm. Fills the cache.

        `on_layer` is called after each layer with its number and the residual (N, D).
        """
        residual = self._embed(batch)  # (N, D)
        x = self._enter(0).attention_norm(residual)
        for i, layer in enumerate(self.layers):
            attended = self._attend(layer, x, batch, *cache.layers[i])  # (N, D)
            if self.parallel_residual:
                x = layer.mlp_norm(residual)
                residual += attended
            else:
                x = layer.mlp_norm.after_adding(attended, residual)
            x = layer.mlp_down(self._activate(layer.mlp_up(x)))
            if layer.mlp_output_norm:
                x = layer.mlp_output_norm(x)
            last = i + 1 == len(self.layers)
            norm = self.final_norm if last else self._enter(i + 1).attention_norm
            x = norm.after_adding(x, residual)
            if on_layer:
                on_layer(i, residual)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V)."""
        logits = self.head(hidden)
        if self._final_softcap:
            logits = self._final_softcap * torch.tanh(logits / self._final_softcap)
        return logits

    def _resolve(self) -> None:
        """Find the parts of the model."""
        family, find = self.family, finder(self._model)

        def optional(path: str | None) -> Any:
            return find(path) if path else None

        embedding = find(family.embedding)
        self.embedding = embedding if family.embedding_scales else plain(embedding, nn.Embedding)
        self.head = Linear(self._model.get_output_embeddings())
        self.final_norm = Norm(find(family.final_norm), family)
        self.embedding_norm = (
            Norm(find(family.embedding_norm), family) if family.embedding_norm else None
        )
        self.layers = [
            DecoderLayer(layer, family, self.config, i)
            for i, layer in enumerate(find(family.layers))
        ]
        self._rotary = optional(family.rotary)
        self.learned = optional(family.position_embedding)
        self._structure = structure(self._model)

    def _enter(self, layer: int) -> DecoderLayer:
        """The layer, whose weights are read from now on, and those of the one before no more."""
        return self.layers[layer]

    def _look_up(self, tokens: Tensor) -> Tensor:
        return F.embedding(tokens, self.embedding.weight)

    def _embed(self, batch: DecoderBatch) -> Tensor:
        x = self._look_up(batch.tokens)
        if self.family.embedding_scales:
            x = x * self.embedding.embed_scale.to(x.dtype)  # HF too rounds the factor first
        if self.learned is not None:
            rows = batch.positions + self.family.position_offset
            x = x + F.embedding(rows, self.learned.weight)
        return self.embedding_norm(x) if self.embedding_norm else x

    def _attend(
        self, layer: DecoderLayer, x: Tensor, batch: DecoderBatch, keys: Tensor, values: Tensor
    ) -> Tensor:
        """(N, D): attention with its output projection, as it is added to the residual."""
        norms = (layer.query_norm, layer.key_norm)
        q_norm, k_norm = (norm.weight if norm else None for norm in norms)
        eps = norm_eps(layer.query_norm) if layer.query_norm else 0.0
        q = ops.rope_and_store_kv(
            layer.qkv.product(x), layer.qkv.bias, q_norm, k_norm, self.cos_sin, batch.positions,
            keys, values, batch.slot_mapping, self.num_heads, norm_eps=eps,
        )  # fmt: skip  # (N, H, head_dim)
        if batch.cu_seqlens is None:
            out = ops.decode_attention(
                q, keys, values, batch.block_tables, batch.seq_lens, self.scale,
                self.alibi_slopes, layer.window, self.attention_softcap,
            )  # fmt: skip
        else:
            out = ops.prefill_attention(
                q, keys, values, batch.block_tables, batch.cu_seqlens, batch.seq_lens,
                batch.max_query_len, self.scale, self.alibi_slopes, layer.window,
                self.attention_softcap,
            )  # fmt: skip
        projected = layer.attention_output(out.flatten(1))
        return layer.attention_output_norm(projected) if layer.attention_output_norm else projected

    def _slopes(self) -> Tensor:
        return alibi_slopes(self.num_heads)

    def _rotary_table(self) -> Tensor:
        """(max_positions, rotary_dim) fp32, from the model's own module, so with its scaling."""
        assert self._rotary is not None
        positions = torch.arange(self.max_positions, device=self.device).unsqueeze(0)
        like = torch.empty(0, dtype=torch.float32, device=self.device)
        cos, sin = self._rotary(like, positions)  # (1, P, R), each half repeated
        half = cos.shape[-1] // 2
        return torch.cat((cos[0, :, :half], sin[0, :, :half]), -1).contiguous()


def structure(model: nn.Module) -> list[tuple[nn.Module, list[str]]]:
    """The modules of a model, and which parameters each has."""
    return [
        (module, [name for name, value in module._parameters.items() if value is not None])
        for module in model.modules()
    ]


def _attention_softcap(config: Any) -> float:
    """0 where the model's own attention applies none: HF's sdpa leaves it out, and rollout must
    follow the distribution that is trained. Load Gemma 2 with eager attention to have it."""
    if config._attn_implementation == "sdpa":
        return 0.0
    return getattr(config, "attn_logit_softcapping", None) or 0.0


def alibi_slopes(heads: int) -> Tensor:
    """(heads,) fp32: powers of 2^(-8/n) for n the power of two below, the rest from 2n's odd ones.

    Source: arXiv 2108.12409, section 3 and its reference code.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(heads - power)]
    return torch.tensor(slopes, dtype=torch.float32)
