"""What this machine offers to a rank: its free memory, and how fast the memory is read."""

from __future__ import annotations

import time

import torch

from fasthessian.memory import available_bytes
from fasthessian.planning.machines import Machine

NUMBERS = 1 << 26  # float32 that are read: 256 MiB, more than caches hold
REPEATS = 5


def this_machine(ranks: int) -> Machine:
    """One of so many ranks on this machine: a GPU each where there is one, else a share of the CPU.

    The memory is what is free now. Its bandwidth is the best of five reads. Networks are not
    measured.
    """
    cpu = torch.device("cpu")
    device = torch.device("cuda") if torch.cuda.is_available() else cpu
    share = 1 if device.type == "cuda" else ranks
    return Machine(
        memory=available_bytes(device) / share,
        host_memory=available_bytes(cpu) / ranks,
        memory_bandwidth=read_bandwidth(device) / share,
        ranks_per_node=ranks,
        gpu=device.type == "cuda",
        about="this machine: free memory, and its bandwidth measured now",
    )


def read_bandwidth(device: torch.device) -> float:
    """Bytes per second of a sum over many numbers, the best of some runs."""
    x = torch.zeros(NUMBERS, dtype=torch.float32, device=device)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        x.sum().item()  # waits for a GPU
        times.append(time.perf_counter() - start)
    return x.numel() * x.element_size() / min(times)
