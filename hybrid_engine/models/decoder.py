"""The forward pass of rollout: packed tokens, paged cache, fused ops, on the live weights."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hybrid_engine import ops
from hybrid_engine.cache import KVCache
from hybrid_engine.models.family import Family
from hybrid_engine.weights import FusedParameters


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


class FusedLinear:
    """Linear layers with one input as one matrix product."""

    def __init__(self, modules: list[nn.Module]) -> None:
        modules = [_plain(module, nn.Linear) for module in modules]
        self._weight = FusedParameters(modules, "weight")
        biased = [module for module in modules if module.bias is not None]
        self._bias = FusedParameters(biased, "bias") if biased else None

    def refresh(self) -> None:
        self._weight.refresh()
        if self._bias:
            self._bias.refresh()

    def release(self) -> None:
        self._weight.release()
        if self._bias:
            self._bias.release()

    @property
    def bias(self) -> Tensor | None:
        return self._bias.buffer if self._bias else None

    def product(self, x: Tensor) -> Tensor:
        """x W^T, without the bias."""
        return F.linear(x, self._weight.buffer)

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self._weight.buffer, self.bias)


class Norm:
    """A norm module through the fused ops, alone or after adding to the residual in place."""

    def __init__(self, module: nn.Module, kind: str) -> None:
        self._module: Any = module
        self._is_rms = kind == "rms"
        self._eps = float(getattr(module, "variance_epsilon" if self._is_rms else "eps"))

    def __call__(self, x: Tensor) -> Tensor:
        if self._is_rms:
            return ops.rms_norm(x, self._module.weight, self._eps)
        return ops.layer_norm(x, self._module.weight, self._module.bias, self._eps)

    def after_adding(self, x: Tensor, residual: Tensor) -> Tensor:
        if self._is_rms:
            return ops.add_rms_norm(x, residual, self._module.weight, self._eps)
        return ops.add_layer_norm(x, residual, self._module.weight, self._module.bias, self._eps)


class DecoderLayer:
    """The parts of one layer, resolved from the family's paths."""

    def __init__(self, layer: nn.Module, family: Family) -> None:
        find = layer.get_submodule
        self.attention_norm = Norm(find(family.attention_norm), family.norm)
        self.qkv = FusedLinear([find(path) for path in family.qkv])
        self.attention_output = _plain(find(family.attention_output), nn.Linear)
        self.mlp_norm = Norm(find(family.mlp_norm), family.norm)
        self.mlp_up = FusedLinear([find(path) for path in family.mlp_up])
        self.mlp_down = _plain(find(family.mlp_down), nn.Linear)


class Decoder:
    """Runs an HF causal language model of a known family without its own forward."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        config: Any = model.config
        self.num_heads: int = config.num_attention_heads
        self.kv_heads: int = getattr(config, "num_key_value_heads", None) or self.num_heads
        self.head_dim: int = (
            getattr(config, "head_dim", None) or config.hidden_size // self.num_heads
        )
        self.max_positions: int = config.max_position_embeddings
        self._model: Any = model
        self._family = family
        self._scale = self.head_dim**-0.5
        self._activation = _activation(getattr(config, family.activation), len(family.mlp_up) == 2)
        self._cos_sin: Tensor | None = None
        self._resolve()

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def vocab_size(self) -> int:
        return self._head.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self._embedding.weight.device

    def refresh(self) -> None:
        """See the modules and parameters as they are now. Call before a rollout."""
        if list(self._model.modules()) != self._modules:  # an adapter, a resized embedding
            self._resolve()
        for layer in self._layers:
            layer.qkv.refresh()
            layer.mlp_up.refresh()
        if self._rotary is not None:
            self._cos_sin = self._rotary_table()

    def release(self) -> None:
        """Leave the model's parameters as if the decoder had never been there."""
        for layer in self._layers:
            layer.qkv.release()
            layer.mlp_up.release()

    def hidden_states(self, batch: DecoderBatch, cache: KVCache) -> Tensor:
        """(N, D): the last hidden states, after the final norm. Fills the cache."""
        residual = self._embed(batch)  # (N, D)
        x = self._layers[0].attention_norm(residual)
        for i, layer in enumerate(self._layers):
            attended = self._attend(layer, x, batch, *cache.layers[i])  # (N, H * D)
            x = layer.mlp_norm.after_adding(_linear(layer.attention_output, attended), residual)
            x = _linear(layer.mlp_down, self._activation(layer.mlp_up(x)))
            last = i + 1 == len(self._layers)
            norm = self._final_norm if last else self._layers[i + 1].attention_norm
            x = norm.after_adding(x, residual)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, D) -> (N, V)."""
        return _linear(self._head, hidden)

    def _resolve(self) -> None:
        """Find the parts of the model."""
        family, find = self._family, self._model.get_submodule
        self._embedding = _plain(find(family.embedding), nn.Embedding)
        self._head = _plain(self._model.get_output_embeddings(), nn.Linear)
        self._final_norm = Norm(find(family.final_norm), family.norm)
        self._layers = [DecoderLayer(layer, family) for layer in find(family.layers)]
        self._rotary = find(family.rotary) if family.rotary else None
        self._learned = find(family.position_embedding) if family.position_embedding else None
        self._modules = list(self._model.modules())

    def _embed(self, batch: DecoderBatch) -> Tensor:
        x = F.embedding(batch.tokens, self._embedding.weight)
        if self._learned is not None:
            rows = batch.positions + self._family.position_offset
            x = x + F.embedding(rows, self._learned.weight)
        return x

    def _attend(
        self, layer: DecoderLayer, x: Tensor, batch: DecoderBatch, keys: Tensor, values: Tensor
    ) -> Tensor:
        qkv, bias = layer.qkv.product(x), layer.qkv.bias
        q = ops.rope_and_store_kv(
            qkv, bias, None, None, self._cos_sin, batch.positions, keys, values,
            batch.slot_mapping, self.num_heads,
        )  # fmt: skip  # (N, H, D)
        if batch.cu_seqlens is None:
            out = ops.decode_attention(
                q, keys, values, batch.block_tables, batch.seq_lens, self._scale
            )
        else:
            out = ops.prefill_attention(
                q, keys, values, batch.block_tables, batch.cu_seqlens, batch.seq_lens,
                batch.max_query_len, self._scale,
            )  # fmt: skip
        return out.flatten(1)

    def _rotary_table(self) -> Tensor:
        """(max_positions, rotary_dim) fp32, from the model's own module, so with its scaling."""
        assert self._rotary is not None
        positions = torch.arange(self.max_positions, device=self.device).unsqueeze(0)
        like = torch.empty(0, dtype=torch.float32, device=self.device)
        cos, sin = self._rotary(like, positions)  # (1, P, R), each half repeated
        half = cos.shape[-1] // 2
        return torch.cat((cos[0, :, :half], sin[0, :, :half]), -1).contiguous()


def _plain(module: nn.Module, kind: type[nn.Module]) -> Any:
    """The module, if its forward does nothing but use its parameters: no adapter, no quantiser."""
    if type(module) is not kind:
        raise ValueError(
            f"the hybrid engine reads plain nn.{kind.__name__} layers, found "
            f"{type(module).__name__}"
        )
    return module


def _linear(module: nn.Module, x: Tensor) -> Tensor:
    """A linear layer without the hooks and checks of `nn.Module.__call__`."""
    return F.linear(x, module.weight, module.bias)  # type: ignore[arg-type]


def _activation(name: str, gated: bool) -> Callable[[Tensor], Tensor]:
    tanh = name in ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")
    if gated and name in ("silu", "swish"):
        return ops.silu_and_mul
    if gated and (tanh or name == "gelu"):
        return functools.partial(ops.gelu_and_mul, tanh=tanh)
    if not gated and name == "relu":
        return ops.relu
    if not gated and (tanh or name == "gelu"):
        return functools.partial(ops.bias_gelu, bias=None, tanh=tanh)
    raise ValueError(f"the hybrid engine has no kernel for the activation {name!r}")
