"""The kernel build: its cache, its lock, its errors, and what a wheel carries."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from hybrid_engine.ops import build

ROOT = Path(__file__).resolve().parents[1]
BUILD = "from pathlib import Path; import sys; sys.path.insert(0, sys.argv[2]); import build; "
BUILD += "print(build.build_cpu(Path(sys.argv[1]), 'default'))"

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="no C++ compiler"
)


@pytest.fixture
def csrc(tmp_path):
    """Two sources and a header, shaped like the real folder."""
    folder = tmp_path / "csrc"
    for name in ("cpu", "bindings"):
        (folder / name).mkdir(parents=True)
    (folder / "kernels.h").write_text("constexpr int kAnswer = 42;\n")
    (folder / "cpu" / "one.cpp").write_text(
        '#include "kernels.h"\n'
        'extern "C" __attribute__((visibility("default"))) int answer() { return kAnswer; }\n'
    )
    (folder / "bindings" / "two.cpp").write_text("int unused;\n")
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("HYBRID_ENGINE_CACHE_DIR", str(folder))
    return folder


@pytest.fixture
def slow_compiler(tmp_path):
    """A compiler that notes each compilation in `calls` and waits while there is a file `hold`."""
    real = build.find_compiler()
    script = tmp_path / "slow-cxx"
    script.write_text(
        "#!/bin/sh\n"
        'case " $* " in *" -c "*)\n'
        f'  echo "$*" >> {tmp_path}/calls\n'
        f"  while [ -e {tmp_path}/hold ]; do sleep 0.1; done;;\n"
        f'esac\nexec {real} "$@"\n'
    )
    script.chmod(0o755)
    return script


def start_build(csrc, **env):
    command = [sys.executable, "-c", BUILD, str(csrc), str(ROOT / "hybrid_engine" / "ops")]
    return subprocess.Popen(
        command,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def wait_for(path, seconds=60.0):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)


def test_builds_a_library_that_works_and_keeps_no_rubbish(csrc, cache):
    library = build.build_cpu(csrc, "default")
    assert ctypes.CDLL(str(library)).answer() == 42
    assert {path.name for path in library.parent.iterdir()} == {library.name, "lock", "build.log"}
    written = library.stat().st_mtime_ns
    assert build.build_cpu(csrc, "default") == library
    assert library.stat().st_mtime_ns == written


@pytest.mark.parametrize("edited", ["kernels.h", "cpu/one.cpp", "bindings/two.cpp"])
def test_key_follows_sources(csrc, cache, edited):
    before = build.build_cpu(csrc, "default")
    path = csrc / edited
    path.write_text(path.read_text().replace("42", "43") + "// edited\n")
    after = build.build_cpu(csrc, "default")
    assert after.parent != before.parent
    assert ctypes.CDLL(str(after)).answer() == (43 if edited == "kernels.h" else 42)


def test_key_follows_flags_compiler_and_torch(csrc, cache, slow_compiler, tmp_path, monkeypatch):
    import torch

    folders = [build.build_cpu(csrc, isa).parent for isa in ("default", "avx2")]
    monkeypatch.setattr(build, "CPU_FLAGS", [*build.CPU_FLAGS, "-DEDITED"])
    folders.append(build.build_cpu(csrc, "default").parent)
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    folders.append(build.build_cpu(csrc, "default").parent)
    monkeypatch.setenv("CXX", str(slow_compiler))
    folders.append(build.build_cpu(csrc, "default").parent)
    assert len(set(folders)) == 5


def test_two_processes_at_once_build_once(csrc, cache, slow_compiler, tmp_path):
    (tmp_path / "hold").touch()
    both = [start_build(csrc, CXX=str(slow_compiler)) for _ in range(2)]
    wait_for(tmp_path / "calls")
    time.sleep(1.5)  # for the other to come as far
    (tmp_path / "hold").unlink()
    outputs = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    assert len((tmp_path / "calls").read_text().splitlines()) == 2  # one for each source


def test_a_killed_build_blocks_nobody(csrc, cache, slow_compiler, tmp_path):
    (tmp_path / "hold").touch()
    killed = start_build(csrc, CXX=str(slow_compiler))
    try:
        wait_for(tmp_path / "calls")
        os.kill(killed.pid, signal.SIGKILL)  # only Python: its compilers live on
        killed.wait(timeout=20)
        (tmp_path / "hold").unlink()
        rerun = start_build(csrc, CXX=str(slow_compiler))
        out, err = rerun.communicate(timeout=60)
        assert rerun.returncode == 0, err
        assert ctypes.CDLL(out.strip()).answer() == 42
        assert not list(Path(out.strip()).parent.glob("unfinished-*"))
    finally:
        (tmp_path / "hold").unlink(missing_ok=True)  # what was left of the first build ends too
        killed.communicate()


def test_no_compiler_is_one_clear_error(csrc, cache, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(build.BuildError, match=r"no C\+\+ compiler found.*Install g\+\+"):
        build.build_cpu(csrc, "default")
    assert not cache.exists()


def test_compile_error_gives_its_first_lines_and_the_log(csrc, cache):
    (csrc / "cpu" / "one.cpp").write_text('#error "the planted mistake"\n')
    with pytest.raises(build.BuildError) as raised:
        build.build_cpu(csrc, "default")
    message = str(raised.value)
    assert "the planted mistake" in message
    assert len(message.splitlines()) <= 25
    log = next(cache.glob("*/build.log"))
    assert str(log) in message
    assert "the planted mistake" in log.read_text()
    assert not list(cache.glob("*/*.so"))


def test_unwritable_cache_is_a_clear_error(csrc, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HYBRID_ENGINE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(
        build.BuildError, match=r"cannot write the kernel cache.*CACHE_DIR at a wri"
    ):
        build.build_cpu(csrc, "default")


def test_a_user_without_a_home_is_a_clear_error(csrc, monkeypatch):
    for name in ("HYBRID_ENGINE_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 2)  # of nobody in the list of users
    with pytest.raises(build.BuildError, match=r"no home directory.*CACHE_DIR at a wri"):
        build.build_cpu(csrc, "default")


IMPORT = "from hybrid_engine import ops; print(ops.NATIVE.library, '|', ops.NATIVE.reason)"


@pytest.fixture
def import_ops(tmp_path):
    """Imports the ops in a fresh interpreter without a compiler, under a policy."""

    def run(policy):
        env = {key: value for key, value in os.environ.items() if key != "CXX"}
        env |= {
            "HYBRID_ENGINE_NATIVE": policy,
            "HYBRID_ENGINE_CACHE_DIR": str(tmp_path / "none"),
            "PATH": "",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-c", IMPORT]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)

    return run


def test_policy_auto_warns_and_goes_on(import_ops):
    result = import_ops("auto")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("None | no C++ compiler found")
    assert result.stderr.count("RuntimeWarning: hybrid_engine runs on its PyTorch reference") == 1


def test_policy_require_fails_with_the_reason(import_ops):
    result = import_ops("require")
    assert result.returncode != 0
    assert "BuildError: no C++ compiler found" in result.stderr.splitlines()[-1]


def test_policy_off_is_silent(import_ops):
    result = import_ops("off")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip() == "None | HYBRID_ENGINE_NATIVE=off"


def test_an_unknown_policy_names_the_known_ones(import_ops):
    result = import_ops("maybe")
    assert result.returncode != 0
    last = result.stderr.splitlines()[-1]
    assert last == ("ValueError: HYBRID_ENGINE_NATIVE='maybe': expected one of auto, require, off")


def isolation():
    """No network is needed when this environment can build by itself."""
    try:
        major = int(version("setuptools").split(".")[0])
    except ModuleNotFoundError:
        major = 0
    return ["--no-build-isolation"] if major >= 77 else []


def test_wheel_carries_the_kernel_sources(tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    for name in ("pyproject.toml", "setup.py", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, project)
    (project / "README.md").write_text("")
    for name in ("csrc", "hybrid_engine", "rlhf"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "-q", "-w", str(tmp_path)]
    result = subprocess.run(
        [*command, *isolation()], cwd=project, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    wheel = next(tmp_path.glob("hybrid_rlhf-*.whl"))
    assert wheel.name.endswith("-py3-none-any.whl")
    carried = set(zipfile.ZipFile(wheel).namelist())
    sources = {path for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert {f"hybrid_engine/_csrc/{path.relative_to(ROOT / 'csrc')}" for path in sources} <= carried
    assert "hybrid_engine/ops/build.py" in carried
