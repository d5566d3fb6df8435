"""Pick the next token of each sequence, and say how probable it was."""

from __future__ import annotations

import torch
from torch import Tensor

from hybrid_engine.ops import check
from hybrid_engine.ops.registry import define_op

_MASK32 = 0xFFFFFFFF


def _fake(logits: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    real = logits.new_empty(rows, dtype=torch.float32)
    return logits.new_empty(rows, dtype=torch.int64), real, torch.empty_like(real)


def _validate(logits: Tensor, *args: object) -> None:
    if logits.numel() and not torch.isfinite(logits.amax(-1)).all():
        raise ValueError("logits: NaN, or a row whose largest logit is not finite")


@define_op(
    "sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, "
    "Tensor seeds, Tensor positions, Tensor? repetition_penalty=None, Tensor? seen=None) "
    "-> (Tensor, Tensor, Tensor)",
    fake=_fake,
    validate=_validate,
)
def sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seeds: Tensor,
    positions: Tensor,
    repetition_penalty: Tensor | None = None,
    seen: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One token a row, by inverting the distribution function at a counter-based uniform.

    The uniform is Philox(seed, position), so a sequence draws the same tokens whatever batch it is
    in. Filters apply in the order of HF: penalty, temperature, top-k, top-p, min-p; ties at a
    threshold all stay in.

    Args:
        logits: (B, V), fp32, bf16 or fp16. NaN, or a row without a finite maximum, is an error. A
            CUDA kernel cannot raise one: it gives the row token -1 and log-probs of NaN, unless
            HYBRID_ENGINE_CHECK=1 looks at the logits first.
        temperature: (B,) fp32; 0 takes the first largest logit.
        top_k: (B,) int64; 0 keeps all.
        top_p: (B,) fp32; keeps the fewest most probable tokens whose mass reaches top_p; 1: all.
        min_p: (B,) fp32; drops tokens below min_p times the largest probability; 0: none.
        seeds, positions: (B,) int64; position is the token's index in its response.
        repetition_penalty: (B,) fp32 or None; divides positive and multiplies negative logits of
            the tokens marked in `seen` (arXiv 1909.05858, section 4.1).
        seen: (B, V) uint8, needed with the penalty.

    Returns:
        tokens: (B,) int64.
        logprobs: (B,) fp32, under softmax(logits / temperature), before penalty and truncation;
            temperature 1 stands in for 0.
        truncated_logprobs: (B,) fp32, under the distribution that was sampled from (greedy: 0).
    """
    check.shape("logits", logits, (-1, -1))
    check.first_operand("logits", logits)
    rows, vocab = logits.shape
    for name, tensor, dtype in (
        ("temperature", temperature, torch.float32),
        ("top_k", top_k, torch.int64),
        ("top_p", top_p, torch.float32),
        ("min_p", min_p, torch.float32),
        ("seeds", seeds, torch.int64),
        ("positions", positions, torch.int64),
        ("repetition_penalty", repetition_penalty, torch.float32),
    ):
        check.operand(name, tensor, (rows,), dtype, logits)
    check.operand("seen", seen, (rows, vocab), torch.uint8, logits)
    if rows == 0:
        return _fake(logits)
    if vocab == 0:
        raise ValueError(f"logits: expected at least one token, got [{rows}, 0]")
    _validate(logits)
    wide = logits.double()
    greedy = temperature == 0
    divisor = torch.where(greedy, 1.0, temperature.double()).unsqueeze(1)
    full = torch.log_softmax(wide / divisor, -1)
    penalised = _penalise(wide, repetition_penalty, seen)
    kept = _truncate(torch.softmax(penalised / divisor, -1), top_k, top_p, min_p)
    cumulative = kept.cumsum(-1)
    target = philox_uniform(seeds, positions).unsqueeze(1) * cumulative[:, -1:]
    drawn = (cumulative <= target).sum(-1)  # zero-mass tokens add nothing and are passed over
    tokens = torch.where(greedy, penalised.argmax(-1), drawn)
    chosen = tokens.unsqueeze(1)
    truncated = (kept.gather(1, chosen) / cumulative[:, -1:]).log().squeeze(1)
    return (
        tokens,
        full.gather(1, chosen).squeeze(1).float(),
        torch.where(greedy, 0.0, truncated).float(),
    )


def _penalise(logits: Tensor, penalty: Tensor | None, seen: Tensor | None) -> Tensor:
    if penalty is None:
        return logits
    if seen is None:
        raise ValueError("seen: needed with repetition_penalty, got None")
    factor = penalty.double().unsqueeze(1)
    scaled = torch.where(logits > 0, logits / factor, logits * factor)
    return torch.where(seen.bool(), scaled, logits)


def _truncate(probabilities: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Zero what the filters drop; the rest is not normalised. (B, V) -> (B, V)."""
    vocab = probabilities.shape[1]
    k = torch.where(top_k > 0, top_k.clamp(max=vocab), vocab).unsqueeze(1)
    ordered = probabilities.sort(-1, descending=True).values
    kept = torch.where(probabilities >= ordered.gather(1, k - 1), probabilities, 0.0)
    ordered = kept.sort(-1, descending=True).values
    mass = ordered.cumsum(-1)
    # The first place where the mass reaches top_p of what top-k left.
    last = (mass < top_p.double().unsqueeze(1) * mass[:, -1:]).sum(-1, keepdim=True)
    threshold = ordered.gather(1, last.clamp(max=vocab - 1))
    threshold = torch.where(top_p.unsqueeze(1) < 1, threshold, 0.0)
    floor = min_p.double().unsqueeze(1) * ordered[:, :1]
    return torch.where(kept >= torch.maximum(threshold, floor), kept, 0.0)


def philox_uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """Uniforms in [0, 1), (B,) fp64, from Philox4x32-10 with key = seed and counter = position.

    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    counter = [positions & _MASK32, (positions >> 32) & _MASK32]
    counter += [torch.zeros_like(positions), torch.zeros_like(positions)]
    key = [seeds & _MASK32, (seeds >> 32) & _MASK32]
    for _ in range(10):
        high0, low0 = _multiply(counter[0], 0xD2511F53)
        high1, low1 = _multiply(counter[2], 0xCD9E8D57)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) & _MASK32, (key[1] + 0xBB67AE85) & _MASK32]
    return ((counter[0] >> 5) * 2**26 + (counter[1] >> 6)).double() * 2.0**-53


def _multiply(a: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 32 x 32 bit product, in int64 without overflow."""
    low_part = (a & 0xFFFF) * constant
    high_part = (a >> 16) * constant + (low_part >> 16)
    return (high_part >> 16) & _MASK32, ((high_part & 0xFFFF) << 16) | (low_part & 0xFFFF)
