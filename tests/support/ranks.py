"""Processes that form a gloo group: tests call functions in all of them."""

from __future__ import annotations

import faulthandler
import importlib
import multiprocessing
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

WAIT = 120  # seconds for one call on all ranks


class Pool:
    """``size`` processes with one thread each, which keep their process group between calls.

    If one of them dies, that test fails, and the next one gets new processes.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._start()

    def _start(self) -> None:
        size = self.size
        self._folder = tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        store = Path(self._folder.name) / "store"
        self._pipes, self._processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, rank, size, str(store)))
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What ``function(*args)``, a function of a test module, returns on each rank.

        Raises:
            AssertionError: it raised on a rank; the message holds all tracebacks.
        """
        if self.closed:
            self._start()
        for pipe in self._pipes:
            pipe.send((function.__module__, function.__qualname__, args))
        found, failures = [], []
        for rank, pipe in enumerate(self._pipes):
            if not pipe.poll(WAIT):
                self.close()
                pytest.fail(f"rank {rank} did not answer in {WAIT} s; {failures}")
            try:
                ok, value = pipe.recv()
            except EOFError:
                self._processes[rank].join(WAIT)
                code = self._processes[rank].exitcode
                self.close()
                pytest.fail(f"rank {rank} died with exit code {code}; {failures}")
            found.append(value)
            if not ok:
                failures.append(f"rank {rank}: {value}")
        assert not failures, "\n".join(failures)
        return found

    @property
    def closed(self) -> bool:
        return any(process.exitcode is not None for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(pipe: Any, rank: int, size: int, store: str) -> None:
    import torch
    import torch.distributed as dist

    faulthandler.enable()  # a crash says where it was
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    while True:
        module, name, args = pipe.recv()
        try:
            function = importlib.import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # as in pytest's own process
                value = function(*args)
            pipe.send((True, value))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
            sys.stdout.flush()


def pool(size: int) -> Iterator[Pool]:
    """For fixtures: a pool that is closed at the end."""
    made = Pool(size)
    try:
        yield made
    finally:
        made.close()
