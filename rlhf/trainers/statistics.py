"""Token-weighted averages over the micro-batches, mini-batches and epochs of one PPO update."""

from __future__ import annotations

from collections import defaultdict

from torch import Tensor

from rlhf import distributed
from rlhf.engines import StepInfo
from rlhf.losses import PolicyLoss, ValueLoss


class UpdateStatistics:
    """Sums over response tokens, and what is known only before the first optimizer step."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._tokens = 0
        self._gap_tokens = 0
        self._gap_sum = 0.0
        self._gap_max = 0.0
        self._stepped = False
        self._last: dict[str, float] = {}

    def add_policy(self, result: PolicyLoss, entropy: Tensor, gap: Tensor, mask: Tensor) -> None:
        """One micro-batch: the loss's sums, summed entropy, and |new - old| log-probs (B, T)."""
        tokens = int(mask.sum())
        self._tokens += tokens
        self._sums["policy_loss"] += float(result.loss.detach())
        self._sums["clipped"] += float(result.clipped)
        self._sums["approx_kl"] += float(result.approx_kl)
        self._sums["ratio"] += float(result.ratio)
        self._sums["ratio_square"] += float(result.ratio_square)
        self._sums["entropy"] += float(entropy)
        if not self._stepped:  # same weights as in the rollout: any gap is numerics
            self._gap_tokens += tokens
            self._gap_sum += float((gap * mask).sum())
            self._gap_max = max(self._gap_max, float((gap * mask).max()))

    def add_value(self, result: ValueLoss) -> None:
        self._sums["value_loss"] += float(result.loss.detach())
        self._sums["value_clipped"] += float(result.clipped)

    def actor_step(self, info: StepInfo) -> None:
        self._stepped = True
        self._last |= {"lr": info.learning_rate, "policy/grad_norm": info.grad_norm}

    def critic_step(self, info: StepInfo) -> None:
        self._last |= {"value/lr": info.learning_rate, "value/grad_norm": info.grad_norm}

    def add_up_ranks(self) -> None:
        """Make the sums those of all ranks; call once, after the last micro-batch."""
        names = sorted(self._sums)
        counts = (self._tokens, self._gap_tokens, self._gap_sum)
        *sums, tokens, gap_tokens, self._gap_sum = distributed.total(
            *(self._sums[name] for name in names), *counts
        )
        self._sums |= dict(zip(names, sums, strict=True))
        self._tokens, self._gap_tokens = int(tokens), int(gap_tokens)
        self._gap_max = distributed.largest(self._gap_max)

    def mean(self, name: str) -> float:
        return self._sums[name] / max(1, self._tokens)

    def metrics(self) -> dict[str, float]:
        """Under the names that TRL's users know."""
        ratio = self.mean("ratio")
        return {
            "policy/approxkl_avg": self.mean("approx_kl"),
            "policy/clipfrac_avg": self.mean("clipped"),
            "policy/entropy_avg": self.mean("entropy"),
            "loss/policy_avg": self.mean("policy_loss"),
            "loss/value_avg": self.mean("value_loss"),
            "val/clipfrac_avg": self.mean("value_clipped"),
            "val/ratio": ratio,
            "val/ratio_var": max(0.0, self.mean("ratio_square") - ratio**2),
            "sampling/logp_difference/mean": self._gap_sum / max(1, self._gap_tokens),
            "sampling/logp_difference/max": self._gap_max,
            **self._last,
        }
