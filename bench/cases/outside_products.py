"""Where the time of runs goes outside the products, next to a plain read of the same bytes.

``python bench/cases/outside_products.py`` runs eigsh, density and trace of a diagonal matrix, whose
products cost little, and prints a table: seconds in products, streams over the basis, rotation
(Ritz vectors), random vectors, allocation, and the rest. ``--busy`` takes one core away meanwhile.
PYTHONPATH says which tree is measured.
"""

import argparse
import collections
import contextlib
import statistics
import subprocess
import sys
import time
import warnings

import torch

import fasthessian as fh
from fasthessian.kernels import native
from fasthessian.krylov import space
from fasthessian.krylov.basis import Basis

LARGE = 134_515_008  # parameters of SmolLM2-135M
PARTS = ("products", "streams", "rotation", "random vectors", "allocation")
BUFFER = 1 << 28  # numbers of the plain read: 1 GiB


class Clock:
    """Seconds in each part; a part inside another one counts for the outer one."""

    def __init__(self):
        self.seconds = collections.Counter()
        self._inside = False

    def timed(self, part, function):
        """The function, whose time is added to the part."""

        def call(*args, **options):
            if self._inside:
                return function(*args, **options)
            self._inside, began = True, time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                self.seconds[part] += time.perf_counter() - began
                self._inside = False

        return call

    @contextlib.contextmanager
    def listening(self):
        """Inside, the package's functions are timed."""
        cpu = native._native.cpu
        places = [(cpu, "project", "streams"), (cpu, "update", "streams"),
                  (cpu, "normal", "random vectors"), (cpu, "signs", "random vectors"),
                  (Basis, "rotate", "rotation"), (space, "empty_rows", "allocation")]  # fmt: skip
        kept = [(owner, name, getattr(owner, name)) for owner, name, _ in places]
        try:
            for (owner, name, function), (_, _, part) in zip(kept, places, strict=True):
                setattr(owner, name, self.timed(part, function))
            yield self
        finally:
            for owner, name, function in kept:
                setattr(owner, name, function)


def least(steps, n, size, vectors):
    """Bytes that a run with a basis must read and write, and those of them in fresh memory.

    V is read twice a step, six vectors are passed over in a step, and each Ritz vector takes a pass
    over V. The rows of V are fresh.
    """
    passes = size * steps * (steps + 1) + 6 * 4 * steps + vectors * (size * steps + 4)
    return n * passes, n * size * steps


def runs():
    """(words, n, call of a matrix, bytes it must move at least)."""
    n, steps, rows = 20_000_000, 40, 12
    few = {"which": "LA", "tol": 1e-12}
    yield (
        f"eigsh, n = {n:,}, {steps} steps", n,
        lambda A: fh.eigsh(A, 1, ncv=steps, max_matvecs=steps, **few), least(steps, n, 4, 1),
    )  # fmt: skip
    yield (
        f"density, n = {n:,}, {steps} steps", n,
        lambda A: fh.density(A, steps=steps, probes=1), least(steps, n, 4, 0),
    )  # fmt: skip
    yield (
        f"trace, n = {n:,}, 16 samples", n,
        lambda A: fh.trace(A, method="hutchinson", max_matvecs=16, rtol=1e-9),
        (16 * 3 * 4 * n, 16 * 4 * n),  # drawn, and read with the product; rows for eight samples
    )  # fmt: skip
    yield (
        f"eigsh, n = {LARGE:,}, {rows} float16 rows", LARGE,
        lambda A: fh.eigsh(A, 1, ncv=rows, max_matvecs=rows + 1, basis="compressed", **few),
        least(rows, LARGE, 2, 1),
    )  # fmt: skip


def speeds():
    """Bytes per second with all threads: of a plain read, and of a fill of fresh memory.

    The operating system clears fresh memory at the first write, which is slow on some machines.
    """
    buffer, reads, fills = torch.ones(BUFFER), [], []
    for _ in range(5):
        began = time.perf_counter()
        buffer.sum()
        reads.append(time.perf_counter() - began)
    for _ in range(5):
        fresh = space.empty_rows(1, BUFFER, torch.float32, "cpu")
        began = time.perf_counter()
        fresh.fill_(1.0)
        fills.append(time.perf_counter() - began)
        del fresh
    return 4 * BUFFER / min(reads), 4 * BUFFER / statistics.median(fills)


def measured(n, call):
    """Seconds of each part of a run, and of all of it."""
    clock = Clock()
    d = torch.rand(n, generator=torch.Generator().manual_seed(0))
    A = fh.SymmetricOperator(clock.timed("products", lambda v: d * v), n, dtype=torch.float32)
    A @ d  # the first product checks the operator
    clock.seconds.clear()
    with clock.listening(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        began = time.perf_counter()
        call(A)
        return clock.seconds, time.perf_counter() - began


def outside(measurement):
    """Seconds of a run that are not in its products."""
    seconds, whole = measurement
    return whole - seconds["products"]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--busy", action="store_true", help="with another job on one core")
    parser.add_argument("--repeats", type=int, default=3, help="of each run; the best is shown")
    options = parser.parse_args()
    spin = [sys.executable, "-c", "while True: pass"]
    reading, fresh = speeds()  # of the quiet machine, also with --busy
    other = subprocess.Popen(spin) if options.busy else None
    try:
        print(
            f"{torch.get_num_threads()} threads, plain read {reading / 1e9:.1f} GB/s, first writes "
            f"of fresh memory {fresh / 1e9:.1f} GB/s\n"
        )
        heads = [*PARTS, "rest", "all but products", "over a plain read", "and first writes"]
        print("| run | " + " | ".join(heads) + " |")
        print("| --- |" + " ---: |" * len(heads))
        for words, n, call, (moved, written) in runs():
            best = min((measured(n, call) for _ in range(options.repeats)), key=outside)
            seconds, whole, took = *best, outside(best)
            rest = whole - sum(seconds.values())
            over = took * reading / moved, took / (moved / reading + written / fresh)
            cells = [*(seconds[part] for part in PARTS), rest, took, *over]
            print(f"| {words} | " + " | ".join(f"{x:.2f}" for x in cells) + " |", flush=True)
    finally:
        if other is not None:
            other.kill()
            other.wait()


if __name__ == "__main__":
    main()
