"""How much memory a device has left for the KV cache."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

SHARE_OF_FREE_MEMORY = 0.9  # what the cache may take of it
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def affordable_blocks(
    bytes_per_block: int, device: torch.device, max_cache_gb: float | None
) -> tuple[int, str]:
    """How many blocks a cache may have, and in words what limits it."""
    if max_cache_gb is not None:
        return int(max_cache_gb * 1e9) // bytes_per_block, f"max_cache_gb={max_cache_gb}"
    free = free_bytes(device)
    if free is None:
        return sys.maxsize, "nothing"
    limit = f"the free memory of {device}, {free / 1e9:.3g} GB,"
    return int(free * SHARE_OF_FREE_MEMORY) // bytes_per_block, limit


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can be allocated on the device; None where the system does not tell.

    On a GPU, what the driver has and what torch keeps without using it; on the CPU, what the
    kernel calls available, within the limit of the control group.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type != "cpu" or not _MEMINFO.exists():
        return None
    fields = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    return min([available, *_left_in_control_group()])


def _left_in_control_group() -> list[int]:
    """Bytes up to the limit of a container, if there is one (control groups, version 2)."""
    limit, used = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if not limit.exists() or not used.exists() or limit.read_text().strip() == "max":
        return []
    return [max(0, int(limit.read_text()) - int(used.read_text()))]
