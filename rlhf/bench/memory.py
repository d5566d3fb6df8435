"""`rlhf bench memory`: what a rollout adds to the model's own memory, each peer in its process.

On a GPU the allocator's peak; on a CPU the process's resident memory, whose peak the kernel keeps.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf.bench.check import check_tokens
from rlhf.bench.peers import Request, find_peer, reason_of
from rlhf.bench.subject import Workload, load_subject


def measure_memory(
    model: str, workload: Workload, peers: Sequence[str], *, dtype: str | None,
    device: str | None, notes: dict[str, str],
) -> list[dict[str, Any]]:  # fmt: skip
    """A row for each peer; `notes` has the reasons of those without one."""
    context = multiprocessing.get_context("spawn")
    rows = []
    for name in peers:
        queue: Any = context.Queue()
        arguments = (queue, name, model, workload, dtype, device)
        process = context.Process(target=_in_process, args=arguments)
        process.start()
        process.join()
        if process.exitcode:
            notes[name] = f"its process ended with {process.exitcode}"
            continue
        found = queue.get()
        if isinstance(found, str):
            notes[name] = found
        else:
            rows.append(found)
    return rows


def _in_process(
    queue: Any, name: str, model: str, workload: Workload, dtype: str | None, device: str | None
) -> None:
    try:
        queue.put(_measure(name, model, workload, dtype, device))
    except Exception as error:  # a foreign library's: the others are measured all the same
        queue.put(reason_of(error))


def _measure(
    name: str, model: str, workload: Workload, dtype: str | None, device: str | None
) -> dict[str, Any] | str:
    subject = load_subject(model, dtype=getattr(torch, dtype) if dtype else None, device=device)
    peer = find_peer(name)
    if (reason := peer.why_not(subject)) is not None:
        return reason
    small = Request([[3, 4, 5]], 2, 1.0)
    vocab = subject.shape.vocab
    stop = workload.stop_token_ids(vocab)
    request = Request(workload.prompts(vocab), workload.new_tokens, 1.0, stop)
    with peer.generator(subject) as generate:
        check_tokens(name, generate, subject, small)  # libraries are loaded, buffers made
        before = _now(subject.device)
        generate(request)
        peak = _peak(subject.device)
    tokens = sum(map(len, request.prompts)) + workload.batch * workload.new_tokens  # at most
    return {
        "model": model, "lengths": "natural" if workload.natural else "fixed", "peer": name,
        "batch": workload.batch, "prompt": workload.prompt_tokens,
        "new_tokens": workload.new_tokens, "dtype": str(subject.dtype).removeprefix("torch."),
        "model_GB": subject.shape.parameters * subject.dtype.itemsize / 1e9,
        "added_GB": max(0.0, peak - before) / 1e9, "peak_GB": peak / 1e9,
        "cache_GB": tokens * subject.kv_bytes / 1e9,
    }  # fmt: skip


def _now(device: torch.device) -> float:
    """Bytes in use; the peak is counted from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew: proc(5)
    return _status("VmRSS")


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _status(name: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(name))
