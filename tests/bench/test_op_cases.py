"""The cases of `make bench`: right where they are right, and refused where an op is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.cases import activation, advantage, attention, linear, norm, sampling
from benchmarks.cases.case import Case, assert_correct
from benchmarks.ops import FAMILIES, parameters
from hybrid_engine import ops
from rlhf.bench.baseline import read_baseline
from tests.bench.test_baseline import ROOT

MAKERS = [make for family in FAMILIES for make in family.SWEEPS]
SHORT = [make for make in MAKERS if attention.SWEEPS.get(make) != ((1,), (4096,))]  # no 16384 keys

pytestmark = pytest.mark.skipif(ops.NATIVE.library is None, reason=str(ops.NATIVE.reason))


def smallest(make: Callable[..., Case]) -> Case:
    (family,) = (family for family in FAMILIES if make in family.SWEEPS)
    batches, widths = family.SWEEPS[make]
    torch.manual_seed(0)
    return make(batches[0], widths[0], torch.float32)


@pytest.mark.parametrize("make", SHORT, ids=lambda make: make.__name__)
def test_a_case_passes_its_own_check(make: Callable[..., Case]) -> None:
    with torch.inference_mode():
        assert_correct(smallest(make))


WRONG: dict[Callable[..., Case], Callable[[Any], Any]] = {
    norm.rms_norm: lambda out: out * 1.001,
    activation.relu: lambda out: out + 1e-4,
    attention.decode_attention: lambda out: out.flip(-1),
    sampling.sample_full: lambda out: (out[0], out[1] + 1e-3, out[2]),
    linear.skinny_linear: lambda out: out + out.abs().amax() * 1e-3,
    advantage.gae: lambda out: (out[1], out[0]),
}


@pytest.mark.parametrize("make", WRONG, ids=lambda make: make.__name__)
def test_a_wrong_result_is_not_timed(make: Callable[..., Case]) -> None:
    case = smallest(make)
    right = case.ours
    case.ours = lambda *args: WRONG[make](right(*args))
    with torch.inference_mode(), pytest.raises(AssertionError):
        assert_correct(case)


def test_the_ops_are_those_of_the_committed_baseline() -> None:
    """Another name would be a new case, and what it replaces would be compared no more."""
    names = {smallest(make).op for make in SHORT}
    assert names == set(read_baseline(ROOT / "benchmarks/baseline.json")) - {
        "rollout",
        "ppo iteration",
    }
    ids = [parameter.id for parameter in parameters()]
    assert len(ids) == len(set(ids)) == 240
