"""The decode step of a decoder as one native call, built from the tensors that it reads now."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hybrid_engine import ops
from hybrid_engine.cache import KVCache
from hybrid_engine.models.parts import DecoderLayer, Linear, Norm, norm_eps

if TYPE_CHECKING:
    from hybrid_engine.models.decoder import Decoder

_DTYPES = [torch.float32, torch.bfloat16, torch.float16]  # their places: csrc/kernels.h, DType
_ACTIVATIONS = ["silu", "gelu", "gelu_tanh", "relu"]  # csrc/kernels.h, Activation


def why_not_native(decoder: Decoder) -> str | None:
    """Why the decoder has to run layer by layer in Python; None when it has not."""
    if ops.NATIVE.runtime is None:
        return ops.NATIVE.runtime_reason
    if decoder.shared_by_ranks:
        return "other ranks take part in its passes"
    if decoder.device.type != "cpu":
        return f"the weights are on {decoder.device}; one native call serves the CPU"
    if decoder.dtype not in _DTYPES:
        return f"no kernel computes in {decoder.dtype}"
    return None


class DecodeProgram:
    """All layers, head, sampling and bookkeeping of several steps without Python.

    It holds pointers to the weights, and the tensors behind them: build a new one when they, or
    the adapters, may have changed. Numbers are those of the decoder's own ops but for rounding.
    """

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        """Raises ValueError when `why_not_native` has a reason, or a tensor has no place in it."""
        if reason := why_not_native(decoder):
            raise ValueError(reason)
        self._native: Any = ops.NATIVE.runtime
        self._dtype = decoder.dtype
        self._kept: list[Tensor] = []
        weights = self._weights(decoder)
        self._program = self._native.DecodeProgram(weights)
        self._cache = [
            self._native.LayerCache(keys=self._pointer(keys), values=self._pointer(values))
            for keys, values in cache.layers
        ]

    @property
    def seconds(self) -> dict[str, float]:
        """Time spent so far: matrices, attention, sampling, rest."""
        return dict(self._program.seconds)

    def bind(self, **fields: Any) -> Any:
        """The rows of `run`, from tensors and numbers named as in csrc/runtime/decode.h."""
        return self._native.DecodeRows(**{
            name: self._pointer(value, value.dtype) if isinstance(value, Tensor) else value
            for name, value in fields.items()
        })  # fmt: skip

    def run(self, rows: Any, count: int, most: int) -> int:
        """Advance the first `count` rows by 1 to `most` tokens; returns how many.

        It comes back early, after a step in which a row ended or filled its blocks.
        """
        return int(self._program.run(rows, self._cache, count, most))

    def _weights(self, decoder: Decoder) -> Any:
        family, config = decoder.family, decoder.config
        scale = 1.0
        if family.embedding_scales:  # HF too rounds the factor first
            scale = float(decoder.embedding.embed_scale.to(self._dtype))
        return self._native.DecoderWeights(
            dtype=_DTYPES.index(self._dtype),
            hidden=decoder.embedding.weight.shape[1],
            vocab=decoder.vocab_size,
            num_heads=decoder.num_heads,
            num_kv_heads=decoder.kv_heads,
            head_dim=decoder.head_dim,
            rotary_dim=0 if decoder.cos_sin is None else decoder.cos_sin.shape[1],
            rms=family.norm == "rms",
            parallel_residual=decoder.parallel_residual,
            gated=len(family.mlp_up) == 2,
            activation=_ACTIVATIONS.index(decoder.activation),
            norm_weight_offset=family.norm_weight_offset,
            attention_scale=decoder.scale,
            attention_softcap=decoder.attention_softcap,
            final_softcap=getattr(config, "final_logit_softcapping", None) or 0.0,
            embedding_scale=scale,
            embedding=self._pointer(decoder.embedding.weight),
            position_embedding=self._weight_of(decoder.learned),
            position_offset=family.position_offset,
            embedding_norm=self._norm(decoder.embedding_norm),
            final_norm=self._norm(decoder.final_norm),
            head=self._linear(decoder.head),
            cos_sin=self._pointer(decoder.cos_sin, torch.float32),
            alibi_slopes=self._pointer(decoder.alibi_slopes, torch.float32),
            layers=[self._layer(layer) for layer in decoder.layers],
        )

    def _layer(self, layer: DecoderLayer) -> Any:
        query_norm = layer.query_norm
        return self._native.LayerWeights(
            attention_norm=self._norm(layer.attention_norm),
            attention_output_norm=self._norm(layer.attention_output_norm),
            mlp_norm=self._norm(layer.mlp_norm),
            mlp_output_norm=self._norm(layer.mlp_output_norm),
            query_norm=self._weight_of(query_norm),
            key_norm=self._weight_of(layer.key_norm),
            head_norm_eps=norm_eps(query_norm) if query_norm else 0.0,
            qkv=self._linear(layer.qkv),
            attention_output=self._linear(layer.attention_output),
            mlp_up=self._linear(layer.mlp_up),
            mlp_down=self._linear(layer.mlp_down),
            window=layer.window,
        )

    def _linear(self, linear: Linear) -> Any:
        weight, active = linear.weight, linear.adapters()
        transposed = not weight.is_contiguous()
        adapters = [
            self._native.AdapterWeights(
                a=self._pointer(down), b=self._pointer(up), rank=down.shape[0], scale=scale
            )
            for down, up, scale in zip(active.down, active.up, active.scales, strict=True)
        ]
        return self._native.LinearWeights(
            weight=self._pointer(weight.t() if transposed else weight),
            bias=self._pointer(active.bias),
            out_dim=weight.shape[0],
            in_dim=weight.shape[1],
            transposed=transposed,
            adapters=adapters,
        )

    def _norm(self, norm: Norm | None) -> Any:
        if norm is None:
            return self._native.NormWeights()
        return self._native.NormWeights(
            weight=self._pointer(norm.weight), bias=self._pointer(norm.bias), eps=norm.eps
        )

    def _weight_of(self, module: Any) -> int | None:
        return None if module is None else self._pointer(module.weight)

    def _pointer(self, tensor: Tensor | None, dtype: torch.dtype | None = None) -> int | None:
        """The tensor's address; the tensor is kept as long as this program."""
        if tensor is None:
            return None
        expected = dtype or self._dtype
        if tensor.dtype != expected or not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise ValueError(
                f"a native step needs contiguous {expected} on the CPU; found {tensor.dtype} of "
                f"shape {tuple(tensor.shape)} and strides {tensor.stride()} on {tensor.device}"
            )
        self._kept.append(tensor)
        return tensor.data_ptr()
