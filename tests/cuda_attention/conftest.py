"""The attention kernels behind `run`: under each schedule on the CPU, and on a GPU where one is."""

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

GPU = [pytest.param(None, id="gpu", marks=pytest.mark.gpu)] * torch.cuda.is_available()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    op_tests.pytest_generate_tests(metafunc)
    if "run" in metafunc.fixturenames:
        schedules = getattr(metafunc.module, "SCHEDULES", SCHEDULES)
        metafunc.parametrize("run", [*schedules, *GPU], ids=str, indirect=True)


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Emulated | op_tests.Implementation:
    """`run(op, *args)`"""
    if request.param is None:
        return op_tests.Implementation("cuda")
    if reason := why_unavailable():
        pytest.skip(reason)
    return Emulated(emulate("attention"), request.param)
