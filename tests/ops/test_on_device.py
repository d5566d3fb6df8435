"""What moves the operands of an op to a GPU, with this CPU in its place."""

from __future__ import annotations

import pytest
import torch

from hybrid_engine import ops
from hybrid_engine.ops import UnpackEntry, unpack_plan
from tests.cuda.layout import misaligned
from tests.ops.on_device import OnDevice

CPU = OnDevice(name="cpu")

pytestmark = pytest.mark.skipif(ops.NATIVE.library is None, reason=str(ops.NATIVE.reason))


def test_results_and_what_was_written_come_back() -> None:
    x, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    total = x + residual
    normed = CPU(ops.add_rms_norm, x, residual, weight, 1e-6)
    assert torch.equal(residual, total)
    assert torch.equal(normed, ops.rms_norm(total, weight, 1e-6))


def test_lists_move_and_the_plan_stays() -> None:
    bucket, out = torch.randn(2, 6), torch.zeros(3, 4)
    plan = unpack_plan([UnpackEntry(0, 6, 3, 4, 0, 0, 0, 3, 0, 4)])
    assert CPU(ops.gather_unpack, bucket, plan, [out], [], [], []) is None
    assert torch.equal(out, bucket.view(3, 4))


def test_layout_and_alignment_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(ops.relu, "overload", lambda x: seen.append(x) or x)
    for x in (misaligned(torch.randn(4, 4)), torch.randn(4, 8)[:, ::2], torch.randn(4, 4).t()):
        assert torch.equal(CPU(ops.relu, x), x)
        assert seen[-1] is not x
        assert seen[-1].stride() == x.stride()
        assert seen[-1].data_ptr() % 16 == x.data_ptr() % 16


def test_the_kernel_alone_sees_contents_that_the_call_refuses() -> None:
    logits = torch.full((1, 8), torch.nan)
    row = torch.ones(1)
    args = (logits, row, row.long(), row, row * 0, row.long(), row.long())
    with pytest.raises(ValueError, match="logits: NaN, or a row whose largest"):
        CPU(ops.sample, *args)
    with pytest.raises(RuntimeError, match="logits: NaN"):
        OnDevice(name="cpu", checked=False)(ops.sample, *args)
