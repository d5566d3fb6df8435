"""The attention kernels behind `run`: on the CPU under each schedule, and on a GPU if there is one."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.emulated import Emulated, emulate
from tests.cuda_emulator.build import SCHEDULES, why_unavailable
from tests.ops import conftest as op_tests

assert_accurate = op_tests.assert_accurate
paged_cache = op_tests.paged_cache
rng = op_tests.rng
pytest_configure = op_tests.pytest_configure
pytest_generate_tests = op_tests.pytest_generate_tests

GPU = [pytest.param(None, id="gpu", marks=pytest.mark.gpu)] * torch.cuda.is_available()


@pytest.fixture(params=[*SCHEDULES, *GPU], ids=str)
def run(request: pytest.FixtureRequest) -> Emulated | op_tests.Implementation:
    """`run(op, *args)`"""
    if request.param is None:
        return op_tests.Implementation("cuda")
    if reason := why_unavailable():
        pytest.skip(reason)
    return Emulated(emulate("attention"), request.param)
