"""Packaging of the kernel sources; everything else is in pyproject.toml.

A plain build carries `csrc/` inside the wheel and compiles on first use. With
HYBRID_ENGINE_BUILD_OPS=1 the CPU kernels are compiled ahead of time, once per instruction set.
The libraries hold no Python ABI, so one wheel serves every Python; build it with
`pip wheel --no-build-isolation .`, because torch must be importable.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
AHEAD_OF_TIME = os.environ.get("HYBRID_ENGINE_BUILD_OPS") == "1"


class BuildWithKernels(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib) / "hybrid_engine"
        shutil.copytree(ROOT / "csrc", package / "_csrc", dirs_exist_ok=True)
        if AHEAD_OF_TIME:
            sys.path.insert(0, str(ROOT / "hybrid_engine" / "ops"))
            import build

            for isa in build.INSTRUCTION_SETS:
                library = build.build_cpu(ROOT / "csrc", isa)
                shutil.copy2(library, package / "ops" / f"prebuilt_cpu_{isa}.so")


class PlatformWheel(bdist_wheel):
    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = not AHEAD_OF_TIME

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return ("py3", "none", platform) if AHEAD_OF_TIME else (python, abi, platform)


setup(cmdclass={"build_py": BuildWithKernels, "bdist_wheel": PlatformWheel})
