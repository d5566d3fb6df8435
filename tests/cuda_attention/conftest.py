"""The attention kernels behind `run`: under each schedule on the CPU, and on a GPU where one is."""

from __future__ import annotations

import pytest

from tests.cuda import conftest as cuda_tests
from tests.cuda_emulator.build import SCHEDULES
from tests.ops import conftest as op_tests

assert_accurate = op_tests.assert_accurate
paged_cache = op_tests.paged_cache
rng = op_tests.rng
run = cuda_tests.run
pytest_configure = op_tests.pytest_configure


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    op_tests.pytest_generate_tests(metafunc)
    if "run" in metafunc.fixturenames:
        schedules = getattr(metafunc.module, "SCHEDULES", SCHEDULES)
        metafunc.parametrize("run", [*schedules, *cuda_tests.GPU], ids=str, indirect=True)
