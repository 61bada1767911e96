"""The free memory of a device, failed allocations, and bytes in words."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

GROUP = Path("/sys/fs/cgroup")  # this process's control group, as a container sees it


def available_bytes(device: torch.device) -> int:
    """Free memory of the device; on a CPU at most what the container's control group (v2) allows.

    Limits of control groups of version 1, or below the root, are not read.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    with contextlib.suppress(OSError, ValueError):  # no control group, or its limit reads "max"
        limit = int((GROUP / "memory.max").read_text())
        used = int((GROUP / "memory.current").read_text())
        for line in (GROUP / "memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):  # cached files, which can be dropped
                used -= int(line.split()[1])
        free = min(free, limit - used)
    return max(free, 0)


def out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, in torch on a GPU or a CPU, or in Python."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)


def readable(count: float) -> str:
    """Bytes with a unit, such as 1.5 GiB."""
    unit = "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if count < 1000:
            break
        count, unit = count / 1024, larger
    return f"{count:.3g} {unit}"
