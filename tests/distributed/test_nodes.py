"""Two machines, simulated: network namespaces that a virtual cable joins."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from rlhf.cli.main import main
from tests.rlhf.test_ranks import TINY, metrics

INTERFACE = "cable"
ADDRESSES = ("10.213.0.1", "10.213.0.2")


@pytest.fixture
def nodes() -> Iterator[list[str]]:
    """Two network namespaces; all that they share is the cable between them, and the disk."""
    if shutil.which("ip") is None:
        pytest.skip("no `ip` command (package iproute2) to make network namespaces with")
    names = [f"rlhf-{os.getpid()}-{number}" for number in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
        cable = ("type", "veth", "peer", "name", INTERFACE, "netns", names[1])
        ip("link", "add", INTERFACE, "netns", names[0], *cable)
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            for interface in (INTERFACE, "lo"):
                ip("-n", name, "link", "set", interface, "up")
        yield names
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, text=True, check=True, timeout=10)


def start(arguments: list[str], *, node: str | None = None) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if node is not None:  # whose name does not lead to it
        arguments = ["ip", "netns", "exec", node, *arguments]
        environment["GLOO_SOCKET_IFNAME"] = INTERFACE
    return subprocess.Popen(
        arguments, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(processes: list[subprocess.Popen[str]]) -> None:
    try:
        for process in processes:
            _, errors = process.communicate(timeout=150)
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.terminate()  # torchrun ends its workers
            process.wait(60)


@pytest.mark.slow
def test_two_nodes_train_as_one_does(nodes: list[str], tmp_path: Path) -> None:
    """SFT and PPO at ZeRO-3: the same metrics and the same weights to the last bit."""
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(TINY))

    def command(step: str, folder: str) -> list[str]:
        options = ["--ppo.reward_functions", '["rlhf.data.synthetic:quality"]']
        options += ["--ppo.actor_path", str(tmp_path / "sft"), "--zero_stage", "3"]
        place = ["--config", str(tmp_path / "tiny.yaml"), "--output_dir", str(tmp_path / folder)]
        return ["-m", "rlhf.cli.main", step, *place, *(options if step == "ppo" else [])]

    assert main(command("sft", ".")[2:]) == 0
    finish([start([sys.executable, *command("ppo", "one"), "--nproc", "2"])])
    torchrun = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{ADDRESSES[0]}:29500",
    ]  # fmt: skip
    runs = []
    for number, node in enumerate(nodes):
        place = ["--local-addr", ADDRESSES[number], "--rdzv-conf", f"is_host={int(number == 0)}"]
        runs.append(start([*torchrun, *place, *command("ppo", "two")], node=node))
    finish(runs)
    assert metrics(tmp_path / "two" / "ppo.jsonl") == metrics(tmp_path / "one" / "ppo.jsonl")
    for name in ("actor", "critic"):
        files = [tmp_path / run / name / "model.safetensors" for run in ("one", "two")]
        assert files[0].read_bytes() == files[1].read_bytes()
