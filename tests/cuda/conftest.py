"""The tests of the op families again, with the CUDA kernels behind `run`."""

from __future__ import annotations

import pytest

from tests.cuda.emulated import Emulated, emulate
from tests.cuda_emulator.build import ORDERS, SCHEDULES, why_unavailable
from tests.ops import conftest as op_tests

assert_accurate = op_tests.assert_accurate
rng = op_tests.rng
pytest_configure = op_tests.pytest_configure


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    op_tests.pytest_generate_tests(metafunc)
    if hasattr(metafunc.module, "FAMILY") and "run" in metafunc.fixturenames:
        orders = getattr(metafunc.module, "ORDERS", ORDERS)
        schedules = [schedule for schedule in SCHEDULES if schedule.order in orders]
        metafunc.parametrize("run", schedules, ids=str, indirect=True)


@pytest.fixture
def run(request: pytest.FixtureRequest) -> Emulated:
    """`run(op, *args)` under each schedule of the module's ORDERS; its FAMILY names the kernels."""
    if reason := why_unavailable():
        pytest.skip(reason)
    return Emulated(emulate(request.module.FAMILY), request.param)
