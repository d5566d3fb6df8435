"""What an iteration is judged by: of its experience, and token-weighted averages of its update."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor

from rlhf import distributed
from rlhf.advantages import group_statistics, masked_mean
from rlhf.engines import StepInfo
from rlhf.experience import Experience
from rlhf.losses import PolicyLoss, ValueLoss
from rlhf.rewards import Scores


def experience_metrics(
    experience: Experience, scores: Scores, *, kl_coef: float, reward_clip: float
) -> dict[str, float]:
    """Of one rollout, under the names that TRL's users know."""
    kl = (experience.old_logprobs - experience.ref_logprobs).sum(1)  # (B,)
    non_score = -kl_coef * kl
    parts = {
        f"objective/reward/{name}": float(part.nanmean()) for name, part in scores.parts.items()
    }
    return {
        "objective/kl": float(kl.mean()),
        "objective/entropy": float(-experience.old_logprobs.sum(1).mean()),
        "objective/non_score_reward": float(non_score.mean()),
        "objective/rlhf_reward": float((experience.scores + non_score).mean()),
        "objective/scores": float(experience.scores.mean()),
        "objective/kl_coef": kl_coef,
        "val/num_eos_tokens": float(experience.ended.sum()),
        "val/response_length": float(experience.response_lengths.float().mean()),
        "val/skipped": float(scores.total.isnan().sum()),
        **(parts if len(parts) > 1 else {}),
        **_group_metrics(experience, reward_clip),
        **_value_metrics(experience),
    }


def speed_metrics(seconds: Mapping[str, float], experience: Experience) -> dict[str, float]:
    """Of one iteration, from the seconds of its phases."""
    total = sum(seconds.values())
    return {
        **{f"timing_s/{name}": value for name, value in seconds.items()},
        "timing_s/step": total,
        "perf/rollout_tokens_per_s": float(experience.response_lengths.sum()) / seconds["rollout"],
        "perf/tokens_per_s": float(experience.lengths.sum()) / total,
    }


def _group_metrics(experience: Experience, reward_clip: float) -> dict[str, float]:
    """Groups whose responses all have the same score teach nothing; how many there are."""
    clipped = experience.scores.clamp(-reward_clip, reward_clip)
    sizes, _, std = group_statistics(clipped, experience.groups)
    if not (sizes > 1).any():
        return {}
    equal = (std <= 1e-6) / sizes  # a group's members share its count
    return {"val/zero_std_groups": round(float(equal.sum()), 3)}


def _value_metrics(experience: Experience) -> dict[str, float]:
    """1 - Var(returns - values) / Var(returns), over response tokens, where there is a critic."""
    if not experience.values.any():
        return {}
    mask = experience.response_mask

    def variance(x: Tensor) -> Tensor:
        return masked_mean((x - masked_mean(x, mask)).square(), mask)

    unexplained = variance(experience.returns - experience.values)
    explained = 1 - unexplained / variance(experience.returns).clamp(min=1e-8)
    return {"val/explained_variance": float(explained)}


class UpdateStatistics:
    """Sums over response tokens, and what is known only before the first optimizer step."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._tokens = 0
        self._mini_batches = 0
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

    def add_importance(self, importance: Tensor, mask: Tensor) -> None:
        """Truncated importance weights (B, T)."""
        self._sums["importance"] += float((importance * mask).sum())

    def add_mixture(self, loss: float) -> None:
        """The mean language-model loss of one optimizer step."""
        self._sums["ptx_loss"] += loss

    def end_mini_batch(self) -> None:
        self._mini_batches += 1

    def actor_step(self, info: StepInfo) -> None:
        self._stepped |= not info.is_skipped
        self._last |= {"lr": info.learning_rate, **info.metrics("policy/")}

    def critic_step(self, info: StepInfo) -> None:
        self._last |= {"value/lr": info.learning_rate, **info.metrics("value/")}

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
        """Per response token; losses that are means already, per optimizer step."""
        count = self._mini_batches if name in ("policy_loss", "ptx_loss") else self._tokens
        return self._sums[name] / max(1, count)

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
            **self._optional("ptx_loss", "loss/ptx_avg"),
            **self._optional("importance", "sampling/importance_avg"),
            **self._last,
        }

    def _optional(self, name: str, metric: str) -> dict[str, float]:
        return {metric: self.mean(name)} if name in self._sums else {}
