"""Ranks as threads of one process, with real values: many more ranks than there are cores."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import multi_threaded_pg as threaded

WAIT = 60  # seconds for all ranks together


def on_threads(size: int, function: Callable[[], Any]) -> list[Any]:
    """What ``function()`` returns on each of ``size`` ranks.

    Raises:
        AssertionError: it raised on a rank, or did not return in time.
    """
    found: list[Any] = [None] * size
    failures: list[str] = []
    store = dist.HashStore()

    def run(rank: int) -> None:
        dist.init_process_group("threaded", rank=rank, world_size=size, store=store)
        try:
            found[rank] = function()
        except BaseException as error:
            failures.append(f"rank {rank}: {traceback.format_exc()}")
            threaded.ProcessLocalGroup.exception_handle(error)  # wakes the other ranks
        finally:
            dist.destroy_process_group()

    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    threaded._install_threaded_pg()
    try:
        threads = [threading.Thread(target=run, args=(r,), daemon=True) for r in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT)
        late = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
        assert not failures, failures[0]
        assert not late, f"ranks {late} did not return in {WAIT} s"
    finally:
        threaded.ProcessLocalGroup.reset()
        threaded._uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
    return found
