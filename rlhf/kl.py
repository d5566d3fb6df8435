"""Estimators of the KL divergence from the reference, and the controller of its weight.

The estimators are Schulman's (http://joschu.net/blog/kl-approx.html), per token, for samples of
the policy: with d = logprob - ref_logprob each has the KL as its mean, k1 and k3 without bias.
"""

from __future__ import annotations

from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d. Unbiased, noisy, may be negative; the one that goes into the reward. (B, T) -> (B, T)"""
    return logprobs - ref_logprobs


def k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d^2 / 2. Biased, low variance; its gradient is that of the KL. (B, T) -> (B, T)"""
    return 0.5 * k1(logprobs, ref_logprobs).square()


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(-d) - 1 + d. Unbiased, never negative. (B, T) -> (B, T)"""
    difference = k1(logprobs, ref_logprobs)
    return (-difference).expm1() + difference


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3}


class KLController:
    """The weight of the KL penalty: fixed, or steered toward a target.

    Source: arXiv 1909.08593, section 2.2: coef *= 1 + clip(kl / target - 1, +-0.2) * n / horizon.
    """

    def __init__(self, coef: float, *, target: float | None = None, horizon: int = 10000) -> None:
        self.coef = coef
        self._target = target
        self._horizon = horizon

    def update(self, kl: float, responses: int) -> None:
        """After a batch of `responses` whose mean KL per response was `kl`, in nats."""
        if self._target is None:
            return
        error = min(max(kl / self._target - 1, -0.2), 0.2)
        self.coef *= 1 + error * responses / self._horizon
