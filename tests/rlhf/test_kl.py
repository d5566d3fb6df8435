"""Schulman's estimators, and the controller of their weight."""

from __future__ import annotations

import math

import pytest
import torch

from rlhf.kl import KLController, k1, k2, k3


def test_estimators_by_hand() -> None:
    logprobs, ref_logprobs = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])
    torch.testing.assert_close(k1(logprobs, ref_logprobs), torch.tensor([[0.5, -1.0]]))
    torch.testing.assert_close(k2(logprobs, ref_logprobs), torch.tensor([[0.125, 0.5]]))
    expected = [[math.exp(-0.5) - 1 + 0.5, math.exp(1.0) - 1 - 1.0]]
    torch.testing.assert_close(k3(logprobs, ref_logprobs), torch.tensor(expected))


def test_estimators_have_the_kl_as_their_mean() -> None:
    """Weighted by the policy over a whole vocabulary; k1 and k3 exactly, k2 nearly."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, generator=generator, dtype=torch.float64)
    other = logits + 0.05 * torch.randn(50, generator=generator, dtype=torch.float64)
    policy, reference = logits.log_softmax(0), other.log_softmax(0)
    kl = torch.nn.functional.kl_div(reference, policy, log_target=True, reduction="sum")
    means = [float((policy.exp() * k(policy, reference)).sum()) for k in (k1, k2, k3)]
    assert means[0] == pytest.approx(float(kl), rel=1e-9)
    assert means[2] == pytest.approx(float(kl), rel=1e-9)
    assert means[1] == pytest.approx(float(kl), rel=0.1)


def test_k2_and_k3_are_never_negative_and_0_for_equal_policies() -> None:
    d = torch.linspace(-5, 5, 101)
    for estimator in (k2, k3):
        assert (estimator(d, torch.zeros(101)) >= 0).all()
        assert (estimator(d, d) == 0).all()


def test_k3_keeps_its_digits_near_0() -> None:
    """exp(-d) - 1 + d is d^2 / 2 there, which cancellation would lose."""
    d = torch.tensor([1e-3])
    torch.testing.assert_close(k3(d, torch.zeros(1)), d.square() / 2, rtol=1e-2, atol=0)


def test_the_gradient_of_k2_is_that_of_the_kl() -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(9, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(9, generator=generator, dtype=torch.float64).log_softmax(0)
    policy = logits.log_softmax(0)
    kl = (policy.exp() * (policy - reference)).sum()
    (expected,) = torch.autograd.grad(kl, logits, retain_graph=True)
    surrogate = (policy.exp().detach() * k2(policy, reference)).sum()
    (found,) = torch.autograd.grad(surrogate, logits)
    torch.testing.assert_close(found, expected)


def test_fixed_controller_stays() -> None:
    controller = KLController(0.05)
    controller.update(100.0, 64)
    assert controller.coef == 0.05


@pytest.mark.parametrize(
    ("kl", "error"), [(6.0, 0.0), (6.6, 0.1), (5.4, -0.1), (60.0, 0.2), (0.0, -0.2), (-3.0, -0.2)]
)
def test_adaptive_controller_by_hand(kl: float, error: float) -> None:
    """coef *= 1 + clip(kl / target - 1, +-0.2) * n / horizon, once a batch."""
    controller = KLController(0.2, target=6.0, horizon=1000)
    controller.update(kl, 50)
    assert controller.coef == pytest.approx(0.2 * (1 + error * 50 / 1000))


def test_adaptive_controller_steers_to_its_target() -> None:
    """On a policy whose KL falls as the weight rises."""
    controller = KLController(0.01, target=4.0, horizon=500)
    for _ in range(400):
        controller.update(1.0 / controller.coef, 64)
    assert 1.0 / controller.coef == pytest.approx(4.0, rel=0.02)
