"""The CUDA kernels behind `run`: on the CPU under each schedule, and on a GPU if one is there."""

from __future__ import annotations

import pytest
import torch

from tests.cuda.emulated import Emulated, emulate
from tests.cuda_emulator.build import ORDERS, SCHEDULES, why_unavailable
from tests.ops import conftest as op_tests
from tests.ops.on_device import OnDevice

assert_accurate = op_tests.assert_accurate
rng = op_tests.rng
pytest_configure = op_tests.pytest_configure

GPU = [pytest.param(None, id="gpu", marks=pytest.mark.gpu)] * torch.cuda.is_available()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    op_tests.pytest_generate_tests(metafunc)
    if "run" in metafunc.fixturenames:
        orders = getattr(metafunc.module, "ORDERS", ORDERS)
        schedules = [schedule for schedule in SCHEDULES if schedule.order in orders]
        metafunc.parametrize("run", [*schedules, *GPU], ids=str, indirect=True)


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Emulated | OnDevice:
    """`run(op, *args)`; the module's FAMILY names the kernels, its ORDERS the schedules."""
    if request.param is None:
        return OnDevice(checked=False)
    if reason := why_unavailable():
        pytest.skip(reason)
    return Emulated(emulate(request.module.FAMILY), request.param)
