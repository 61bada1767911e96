"""The processes of ranks: whether one has ended, and how this one ends."""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import socket
import time
from pathlib import Path

SETTLE = 0.2  # seconds between the last collective and the end


def this_process() -> tuple[str, int]:
    """This machine (with the container) and the number of this process."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.stat('/proc/self/ns/pid').st_ino}", os.getpid()
    return socket.gethostname(), os.getpid()


def has_ended(machine: str, number: int) -> bool | None:
    """Whether a process has ended; None if it is on another machine."""
    if machine != this_process()[0]:
        return None
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
        return status[0] in "ZX"  # Z: the parent has not asked for the exit code yet
    try:
        os.kill(number, 0)
    except OSError:
        return True
    return False


@functools.cache
def settle_at_exit() -> None:
    """Let a process that ends wait a moment, for the threads of gloo.

    A thread that still holds the last collective aborts the process: with torch alone 3 of 16
    processes that ended right after an all-reduce, and none that waited.
    """
    atexit.register(time.sleep, SETTLE)
