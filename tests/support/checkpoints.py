"""Calls that are killed and resumed, and ranks that are threads, for tests of checkpoints.

    python -m tests.support.checkpoints NAME FOLDER [SECONDS]

starts the call NAME of ``CALLS`` or, if FOLDER holds a checkpoint, resumes it, with a save before
every product that takes SECONDS more, and prints a digest of the result.
"""

import contextlib
import json
import os
import sys
import threading
import time
import warnings

import torch

import fasthessian as fh
from fasthessian.checkpoints import keeper
from fasthessian.distributed.ranks import Ranks
from fasthessian.errors import UnsupportedError

F32, F64 = torch.float32, torch.float64
BULK = torch.linspace(-1, 1, 490, dtype=F64)
TOP = torch.tensor([9.0, 7, 5, 4, 3, 2.5, -8, -6, -3.5, -2.2], dtype=F64)
COPIES = torch.cat([TOP.repeat_interleave(2), BULK[::4]])
SLEEP = [0.0]  # seconds that a product takes more


def diagonal(values=COPIES, dtype=F32, low=False):
    d = values.to(dtype)

    def matvec(v):
        time.sleep(SLEEP[0])
        return (d * v).bfloat16().float() if low else d * v

    return fh.SymmetricOperator(matvec, len(d), dtype=dtype, check=False)


def classifier():
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    data = torch.randn(20, 6, generator=generator), torch.arange(20) % 3
    return model, torch.nn.CrossEntropyLoss(), data


def hessian(**options):
    A = fh.Hessian(*classifier(), **options)

    class Slow(type(A)):
        def loss(self, offset=None):
            time.sleep(SLEEP[0])
            return super().loss(offset)

        def losses(self, offsets):
            for _ in offsets:
                time.sleep(SLEEP[0])
            return super().losses(offsets)

        def _multiply(self, requests):
            time.sleep(SLEEP[0])
            super()._multiply(requests)

    A.__class__ = Slow
    Slow.__name__ = "Hessian"
    return A


def blocks():
    return hessian().blocks("layer")


def pairs(A, k=2):
    return fh.eigsh(A, k, tol=1e-2)


CALLS = {  # name: (the operator, the call)
    "eigsh": (diagonal, lambda A, **kw: fh.eigsh(A, 5, ncv=13, **kw)),
    "eigsh of one end": (
        lambda: diagonal(dtype=F64), lambda A, **kw: fh.eigsh(A, 5, "LA", ncv=16, **kw),
    ),
    "eigsh cgs2": (diagonal, lambda A, **kw: fh.eigsh(A, 3, "SA", schedule="cgs2", **kw)),
    "eigsh compressed": (
        diagonal, lambda A, **kw: fh.eigsh(A, 3, basis="compressed", tol=1e-2, **kw),
    ),
    "eigsh inexact": (lambda: diagonal(low=True), lambda A, **kw: fh.eigsh(A, 3, tol=1e-2, **kw)),
    "eigsh unfinished": (diagonal, lambda A, **kw: fh.eigsh(A, 5, ncv=13, max_matvecs=20, **kw)),
    "trace": (lambda: diagonal(BULK + 0.2), lambda A, **kw: fh.trace(A, rtol=0.4, **kw)),
    "trace by the diagonal": (hessian, lambda A, **kw: fh.trace(A, rtol=1e-3, **kw)),
    "trace deflated": (
        hessian,
        lambda A, **kw: fh.trace(
            A, rtol=0.1, method="hutchinson", max_matvecs=60, deflate=pairs(hessian()), **kw
        ),
    ),
    "trace per batch": (
        lambda: hessian(microbatch=4),
        lambda A, **kw: fh.trace(
            A, sampling="per-batch", method="hutchinson", rtol=1e-3, max_matvecs=7, **kw
        ),
    ),
    "trace per batch, then by the diagonal": (
        lambda: {"": (A := hessian(microbatch=4)), **A.blocks("layer")},
        lambda A, **kw: fh.trace(A, sampling="per-batch", rtol=1e-3, **kw),
    ),
    "density": (diagonal, lambda A, **kw: fh.density(A, steps=12, probes=3, **kw)),
    "density without a basis": (
        diagonal, lambda A, **kw: fh.density(A, steps=12, probes=2, basis="none", **kw),
    ),
    "spectrum": (
        diagonal, lambda A, **kw: fh.spectrum(A, 2, steps=15, probes=2, rtol=0.3, **kw),
    ),
    "spectrum compressed": (
        diagonal,
        lambda A, **kw: fh.spectrum(A, (2, 1), steps=15, basis="compressed", tol=1e-2, **kw),
    ),
    "landscape": (
        hessian, lambda A, **kw: fh.landscape(A, pairs(hessian()).vectors, points=4, **kw),
    ),
    "blocks": (blocks, lambda A, **kw: fh.eigsh(A, 2, **kw)),
    "spectrum of blocks": (
        blocks, lambda A, **kw: fh.spectrum(A, 1, steps=10, rtol=0.2, **kw),
    ),
    "trace of blocks deflated": (
        blocks,
        lambda A, **kw: fh.trace(
            A, rtol=0.2, method="hutchinson", max_matvecs=40, deflate=pairs(blocks()), **kw
        ),
    ),
}  # fmt: skip


def save_at_every_boundary():
    keeper.INTERVAL, keeper.SHARE = 0.0, 1e9


def caught(call):
    """What a call returns, and the warnings that it raises, by class and text."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = call()
    return result, [(w.category.__name__, str(w.message)) for w in found]


def main(name, folder, seconds=0.0):
    from tests.support.bits import digest

    torch.set_num_threads(1)
    save_at_every_boundary()
    new, call = CALLS[name]
    A = new()
    held = os.path.isdir(folder) and any(x.endswith(".json") for x in os.listdir(folder))
    SLEEP[0] = float(seconds)
    if held:
        found, warned = caught(lambda: fh.resume(folder, A))
    else:
        found, warned = caught(lambda: call(A, checkpoint=folder))
    print(json.dumps([digest(found), warned]))


def written(path, *words):
    """What ``main`` prints goes to a file; for processes that are forked from a server."""
    with open(path, "w") as stream, contextlib.redirect_stdout(stream):
        main(*words)


class ThreadRanks(Ranks):
    """One of several ranks that are threads of one process."""

    def __init__(self, rank, size, barrier, shelf):
        super().__init__()
        self.rank, self.size, self._barrier, self._shelf = rank, size, barrier, shelf

    def objects(self, item):
        self._shelf[self.rank] = json.dumps(item)
        self._barrier.wait(30)
        found = [json.loads(text) for text in self._shelf]
        self._barrier.wait(30)
        return found

    def together(self, job):
        failure = found = None
        try:
            found = job()
        except Exception as error:
            failure = error
        reasons = self.objects(None if failure is None else repr(failure))
        if any(reasons):
            raise failure or UnsupportedError(f"another rank failed: {max(filter(None, reasons))}")
        return found

    def any(self, flags):
        return [any(column) for column in zip(*self.objects(list(flags)), strict=True)]


def on_threads(size, job):
    """What ``job(ranks)`` returns on each of ``size`` ranks; an error of one is raised."""
    barrier, shelf, found, errors = threading.Barrier(size), [None] * size, [None] * size, []

    def run(rank):
        try:
            found[rank] = job(ThreadRanks(rank, size, barrier, shelf))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next(
            (e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0]
        )
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
