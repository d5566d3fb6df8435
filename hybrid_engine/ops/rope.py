"""Rotary embedding: fused into the way from the QKV projection to the KV cache, and by itself with
a gradient, for training."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hybrid_engine.ops import check
from hybrid_engine.ops.norm import rms_normalise
from hybrid_engine.ops.registry import NAMESPACE, define_op


def _fake(
    qkv: Tensor,
    bias: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos_sin: Tensor | None,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
    *args: object,
) -> Tensor:
    return qkv.new_empty(qkv.shape[0], num_heads, k_cache.shape[-1])


def _validate(
    qkv: Tensor,
    bias: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos_sin: Tensor | None,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    *args: object,
    **kwargs: object,
) -> None:
    """Slots must be in the cache, negative ones excepted, and positions in the table."""
    check.shape("k_cache", k_cache, (-1, -1, -1, -1))
    num_blocks, _, block_size, _ = k_cache.shape
    check.indices("slot_mapping", slot_mapping.clamp(min=0), num_blocks * block_size)
    if cos_sin is not None:
        check.indices("positions", positions, cos_sin.shape[0])


@define_op(
    "rope_and_store_kv(Tensor qkv, Tensor? bias, Tensor? q_norm, Tensor? k_norm, Tensor? cos_sin, "
    "Tensor positions, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slot_mapping, int num_heads, "
    "bool interleaved=False, float norm_eps=1e-06, float norm_weight_offset=0.0) -> Tensor",
    fake=_fake,
    validate=_validate,
)
def rope_and_store_kv(
    qkv: Tensor,
    bias: Tensor | None,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    cos_sin: Tensor | None,
    positions: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    num_heads: int,
    interleaved: bool = False,
    norm_eps: float = 1e-6,
    norm_weight_offset: float = 0.0,
) -> Tensor:
    """Add the bias, normalise and rotate queries and keys, store keys and values, return queries.

    Args:
        qkv: (N, (H + 2K) * D), fp32, bf16 or fp16: queries, keys, values of N packed tokens.
        bias: ((H + 2K) * D,) or None, added first.
        q_norm, k_norm: (D,) or None: RMSNorm weights of each head (Qwen3).
        cos_sin: (max_position, R) fp32 with R <= D: R/2 cosines, then R/2 sines of each position,
            made by the caller with whatever scaling the model has; None: no rotation.
        positions: (N,) int64, row of cos_sin for each token.
        k_cache, v_cache: (num_blocks, K, block_size, D), the dtype of qkv, written in place.
        slot_mapping: (N,) int64, block * block_size + offset; negative: the token is not stored.
        num_heads: H; K and D come from the cache.
        interleaved: rotate the pairs (2i, 2i + 1) (GPT-J) and not (i, i + R/2) (NeoX, Llama).
        norm_eps, norm_weight_offset: of the two norms, as in `rms_norm`.

    Returns (N, H, D), rotated. Source of the rotation: arXiv 2104.09864, eq. 34.
    """
    check.shape("k_cache", k_cache, (-1, -1, -1, -1))
    tokens = qkv.shape[0]
    _, kv_heads, block_size, head_dim = k_cache.shape
    width = (num_heads + 2 * kv_heads) * head_dim
    check.shape("qkv", qkv, (-1, width))
    check.first_operand("qkv", qkv)
    check.operand("bias", bias, (width,), qkv.dtype, qkv)
    check.operand("q_norm", q_norm, (head_dim,), qkv.dtype, qkv)
    check.operand("k_norm", k_norm, (head_dim,), qkv.dtype, qkv)
    check.operand("cos_sin", cos_sin, (-1, -1), torch.float32, qkv)
    if cos_sin is not None and (cos_sin.shape[1] > head_dim or cos_sin.shape[1] % 2):
        raise ValueError(
            f"cos_sin: expected an even width of at most head_dim={head_dim}, "
            f"got {cos_sin.shape[1]}"
        )
    check.operand("positions", positions, (tokens,), torch.int64, qkv)
    check.operand("k_cache", k_cache, k_cache.shape, qkv.dtype, qkv)
    check.operand("v_cache", v_cache, k_cache.shape, qkv.dtype, qkv)
    check.operand("slot_mapping", slot_mapping, (tokens,), torch.int64, qkv)
    wide = qkv.float() if bias is None else qkv.float() + bias.float()
    heads = wide.view(tokens, num_heads + 2 * kv_heads, head_dim)
    q, k, v = heads.split([num_heads, kv_heads, kv_heads], dim=1)  # each (N, heads, D)
    if q_norm is not None:
        q = rms_normalise(q, q_norm, norm_eps, norm_weight_offset)
    if k_norm is not None:
        k = rms_normalise(k, k_norm, norm_eps, norm_weight_offset)
    if cos_sin is not None:
        cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)  # (N, 1, R/2)
        q, k = _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)
    stored = slot_mapping >= 0
    block, offset = slot_mapping[stored] // block_size, slot_mapping[stored] % block_size
    k_cache[block, :, offset] = k[stored].to(k_cache.dtype)
    v_cache[block, :, offset] = v[stored].to(v_cache.dtype)
    return q.to(qkv.dtype).contiguous()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    rotary = 2 * cos.shape[-1]
    head, rest = x[..., :rotary], x[..., rotary:]
    first, second = (head[..., 0::2], head[..., 1::2]) if interleaved else head.chunk(2, dim=-1)
    turned = (first * cos - second * sin, second * cos + first * sin)
    head = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
    return torch.cat((head, rest), -1)


def _fake_rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


@define_op(
    "rope(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved=False) -> (Tensor, Tensor)",
    fake=_fake_rope,
)
def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Queries and keys rotated by their position, for training: gradients to both.

    Args:
        q: (B, H, T, D), fp32, bf16 or fp16, of any strides; k: (B, K, T, D), the dtype of q.
        cos, sin: (B or 1, T, R/2), R <= D, of any floating dtype, with whatever scaling the model
            has: the first half of what Hugging Face models pass. Taken as constants.
        interleaved: rotate the pairs (2i, 2i + 1) (GPT-J) and not (i, i + R/2) (NeoX, Llama).

    Returns (q, k) rotated, laid out in memory as they came. Arithmetic in fp32, rounded once.
    Source: arXiv 2104.09864, eq. 34.
    """
    check_rope(q, k, cos, sin)
    wide_cos, wide_sin = cos.float().unsqueeze(1), sin.float().unsqueeze(1)  # (B or 1, 1, T, R/2)
    turned = (_rotate(x.float(), wide_cos, wide_sin, interleaved) for x in (q, k))
    q_out, k_out = (torch.empty_like(x).copy_(y) for x, y in zip((q, k), turned, strict=True))
    return q_out, k_out


def check_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Raise ValueError unless the shapes are those of `rope`."""
    check.shape("q", q, (-1, -1, -1, -1))
    batch, _, tokens, head_dim = q.shape
    check.shape("k", k, (batch, -1, tokens, head_dim))
    check.dtype("k", k, q.dtype)
    check.shape("cos", cos, (cos.shape[0], tokens, -1))
    check.shape("sin", sin, cos.shape)
    if cos.shape[0] not in (1, batch) or 2 * cos.shape[2] > head_dim:
        expected = f"[1 or {batch}, {tokens}, at most {head_dim // 2}]"
        raise ValueError(f"cos: expected {expected}, got {list(cos.shape)}")


def _save_rope(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, cos, sin, ctx.interleaved = inputs
    ctx.save_for_backward(cos, sin)


def _backward_rope(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor | None, ...]:
    """The transpose of a rotation by an angle is the rotation by its negative."""
    cos, sin = ctx.saved_tensors
    return *rope(grad_q, grad_k, cos, -sin, ctx.interleaved), None, None, None


torch.library.register_autograd(f"{NAMESPACE}::rope", _backward_rope, setup_context=_save_rope)
