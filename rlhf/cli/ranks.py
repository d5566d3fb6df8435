"""Several processes: start them here, join those that a launcher started, and let one speak.

A launcher (torchrun, deepspeed, `--nproc`) tells each process who it is in five variables.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
SPAWNED = "RLHF_SPAWNED"  # by spawn(), which tells of killed ranks itself
GRACE_S = 10.0  # for the others, when one rank has failed


def without_local_rank(arguments: Sequence[str]) -> list[str]:
    """The command line as the user wrote it: deepspeed puts --local_rank=N in front."""
    return [argument for argument in arguments if not argument.startswith("--local_rank=")]


def spawn(arguments: Sequence[str], count: int) -> int:
    """Run `rlhf` with these arguments in `count` processes on this machine; the exit code.

    When one fails, the others have a little time to end by themselves.
    """
    environment = {
        **os.environ, "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), SPAWNED: "1",
    }  # fmt: skip
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    command = [sys.executable, "-m", "rlhf.cli.main", *arguments]
    ranks = [
        subprocess.Popen(command, env={**environment, "RANK": str(i), "LOCAL_RANK": str(i)})
        for i in range(count)
    ]
    try:
        return _wait(ranks)
    except KeyboardInterrupt:  # the terminal has sent it to the ranks too
        _end(ranks, GRACE_S)
        return 130
    finally:
        _end(ranks, 0.0)


def is_launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return "RANK" in os.environ or os.environ.get("WORLD_SIZE", "1") != "1"


def join() -> None:
    """Join the other processes, if a launcher started this one as one of several.

    Raises ValueError where the launcher has left something unsaid.
    """
    if not is_launched():
        return
    given = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    if missing := [name for name in VARIABLES if name not in given]:
        raise ValueError(
            f"the environment has {', '.join(given)} but not {', '.join(missing)}: start several "
            "processes with torchrun, deepspeed or --nproc, which set them all"
        )
    if given["WORLD_SIZE"] == "1":
        return
    import torch
    import torch.distributed as dist

    local_rank = int(given["LOCAL_RANK"])
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"rank {given['RANK']} is process {local_rank} of its machine, which has "
                f"{torch.cuda.device_count()} GPUs: start one process for each GPU"
            )
        torch.cuda.set_device(local_rank)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except (dist.DistError, RuntimeError, ValueError) as error:
        address = f"{given['MASTER_ADDR']}:{given['MASTER_PORT']}"
        raise ValueError(
            f"rank {given['RANK']} does not reach the others at {address}: {_first_line(error)}"
        ) from error


def are_joined() -> bool:
    if "torch" not in sys.modules:
        return False
    import torch.distributed as dist

    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def leave() -> None:
    """When all is done."""
    if are_joined():
        import torch.distributed as dist

        dist.barrier()
        dist.destroy_process_group()


def speaks(error: Exception) -> bool:
    """Whether this rank is the one to tell of its failure: the first that failed by itself."""
    import torch.distributed as dist

    if SPAWNED in os.environ and is_lost_peer(error):
        return False
    store = dist.distributed_c10d._get_default_store()
    try:
        if is_lost_peer(error):
            deadline = time.monotonic() + GRACE_S / 4
            while time.monotonic() < deadline and not store.check(["failed"]):
                time.sleep(0.05)
        return store.add("failed", 1) == 1
    except (dist.DistError, RuntimeError):
        return False  # the first rank has the store, and is gone


def quit_at_once(code: int) -> None:
    """End this process, whatever threads of it still wait for other ranks.

    The first rank stays until the others have asked it who speaks.
    """
    import torch.distributed as dist

    if dist.get_rank() == 0:
        store = dist.distributed_c10d._get_default_store()
        deadline = time.monotonic() + GRACE_S / 2
        while time.monotonic() < deadline and store.add("failed", 0) < dist.get_world_size():
            time.sleep(0.05)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank had ended."""
    import torch.distributed as dist

    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text)


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    """Until all have ended well, or one has not."""
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [(i, code) for i, code in enumerate(codes) if code]
        if failed:
            number, code = failed[0]
            _end(ranks, GRACE_S)
            if code < 0:
                name = signal.Signals(-code).name
                print(f"rlhf: error: rank {number} was killed by {name}", file=sys.stderr)
                return 128 - code
            return code
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.1)


def _end(ranks: list[subprocess.Popen[bytes]], grace: float) -> None:
    deadline = time.monotonic() + grace
    for rank in ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
