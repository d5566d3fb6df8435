"""Several ranks on one machine: processes that a fork server starts, joined by gloo.

The server imports torch, DeepSpeed and the models once; a run of two ranks then costs about a
second. What a rank runs is a module-level function of a test file; it returns what can be pickled.
"""

from __future__ import annotations

import datetime
import faulthandler
import functools
import importlib
import multiprocessing
import os
import pickle
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PRELOAD = "tests.distributed.preload"
ROOT = Path(__file__).resolve().parents[2]


class RankError(AssertionError):
    """A rank raised, died or hung. The message has its rank and its traceback."""


def run_ranks(
    function: Callable[..., Any],
    *args: Any,
    world: int = 2,
    timeout: float = 60.0,
    collective_timeout: float = 20.0,
) -> list[Any]:
    """Run `function(*args)` on `world` ranks; what each returns, by rank.

    torch.distributed and deepspeed.comm are initialised. A rank that is not done after `timeout`
    seconds, or waits for another in one collective for `collective_timeout`, fails. The first rank
    that fails ends the others, and RankError says why it did.
    """
    _warm_up()
    context = _context()
    work = pickle.dumps((function, args))
    with tempfile.TemporaryDirectory() as folder:
        processes, connections = [], []
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            settings = (rank, world, folder, timeout, collective_timeout)
            process = context.Process(target=_rank, args=(theirs, work, *settings), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            connections.append(ours)
        try:
            return _collect(connections, Path(folder))
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(connections: list[Connection], folder: Path) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(connections):
        waiting = {c: rank for rank, c in enumerate(connections) if rank not in results}
        for connection in wait(list(waiting)):
            rank = waiting[connection]  # type: ignore[index]
            try:
                succeeded, result = pickle.loads(connection.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                stack = folder / f"stack_{rank}"
                raise RankError(f"rank {rank} died or hung\n{stack.read_text()}") from None
            if not succeeded:
                raise RankError(f"rank {rank} failed\n{result}")
            results[rank] = result
    return [results[rank] for rank in range(len(connections))]


def _rank(
    connection: Connection,
    work: bytes,
    rank: int,
    world: int,
    folder: str,
    timeout: float,
    collective_timeout: float,
) -> None:
    stack = open(f"{folder}/stack_{rank}", "w")  # noqa: SIM115 (open until the process ends)
    faulthandler.dump_traceback_later(timeout, exit=True, file=stack)
    faulthandler.enable(stack)
    try:
        _join(rank, world, folder, collective_timeout)
        function, args = pickle.loads(work)
        outcome = pickle.dumps((True, function(*args)))
        _barrier()
    except BaseException:
        outcome = pickle.dumps((False, traceback.format_exc()))
    connection.send_bytes(outcome)
    os._exit(0)  # no clean-up that waits for other ranks


def _join(rank: int, world: int, folder: str, collective_timeout: float) -> None:
    importlib.import_module(PRELOAD)
    import deepspeed
    import torch.distributed as dist

    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
    }  # fmt: skip
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=collective_timeout),
    )
    deepspeed.init_distributed(verbose=False)


def _barrier() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.barrier()


@functools.cache
def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOAD])
    return context


@functools.cache
def _warm_up() -> None:
    """Wait for the server's imports, so that no run's time-out counts them."""
    process = _context().Process(target=importlib.import_module, args=(PRELOAD,))
    process.start()
    process.join()
    if process.exitcode:
        raise RankError(f"the ranks' imports failed ({PRELOAD}); is {ROOT} the working directory?")
