"""What the benchmark times on a GPU, made small and checked here: no case is wrong by itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from benchmarks.gpu import cases, cases_model, cases_training, logprobs
from benchmarks.gpu.case import Case, Place
from hybrid_engine import ops

HERE = Place("cpu", shrink=64)
FAMILIES = [*cases.FAMILIES, *cases_model.FAMILIES, *cases_training.FAMILIES]


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f"{f.__module__[15:]}-{f.__name__}")
def test_every_case_passes_its_check(family: Callable[[Place], Iterator[Case]]) -> None:
    torch.manual_seed(0)
    names = []
    for case in family(HERE):
        error, allowed = case.check()
        assert error <= allowed, case.name
        assert case.bytes or case.flops, case.name
        assert case.name not in names
        names.append(case.name)
    assert names


def test_a_wrong_kernel_is_found() -> None:
    case = next(cases.norms(HERE))
    right = case.ours
    object.__setattr__(case, "ours", lambda *args: right(*args) * 1.1)
    error, allowed = case.check()
    assert error > allowed


@pytest.mark.parametrize("name", logprobs.PASSES)
def test_fused_log_probs_and_all_the_logits_agree(name: str) -> None:
    torch.manual_seed(0)
    inputs = logprobs.Inputs.at(HERE)
    assert inputs.logits_bytes == 64 * 2004 * 2
    assert logprobs.largest_difference(name, inputs) <= logprobs.WORST_DIFFERENCE
    ours, plain = (logprobs.PASSES[name](head, inputs) for head in logprobs.HEADS.values())
    assert [x.shape for x in ours] == [x.shape for x in plain]
    for found, expected in zip(ours[2:], plain[2:], strict=True):  # gradients
        torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_every_kind_of_op_is_timed() -> None:
    """Each family of the library has a case, or its log-probs a measurement of their own."""
    timed = {op.reference.__module__ for family in FAMILIES for op in {c.op for c in family(HERE)}}
    known = {op.reference.__module__ for op in ops.OPS.values()}
    assert known - timed == {"hybrid_engine.ops.logprob"}
