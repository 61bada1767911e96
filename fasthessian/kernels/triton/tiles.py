"""Sizes that the Triton kernels are compiled for."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

THREADS = 128  # per program


def power(number: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``number`` and ``least``."""
    return max(least, 1 << (number - 1).bit_length())


class Tile(NamedTuple):
    """The sizes of ``rows.project`` and ``rows.update``."""

    T: int  # groups of F numbers, one per thread
    F: int  # numbers of V in 16 bytes
    B: int  # rows of W, rounded up to a power of two
    BK: int  # rows of V at a time: 16 bytes of each are in flight in every thread
    registers: int  # limit per thread: the 65,536 of a multiprocessor give 512 threads 128 each
    parts: int  # loads of 16 bytes that F numbers of W take; 0: a row of V or W is not aligned


# Keys: bytes per number of V and, where it matters, ``parts``. Lines: 1, 2, 4 and 8 rows of W.
# Columns: (BK, registers) of project without H, of project with H, and of update. More registers
# leave fewer threads that wait for memory at a time; with a lower BK each thread has fewer loads in
# flight. None of these spills (tests/kernels/test_triton_aot.py). The number of tiles per program
# depends on the length n (`_cut` in backend.py), and nothing on the number of rows k, since a
# captured step serves every k. ``make tune`` compares these with others, by k, n and type.
TABLE = {
    (8,): (
        ((8, 80), (8, 80), (8, 80)),
        ((8, 128), (8, 128), (8, 128)),
        ((4, 128), (4, 128), (4, 128)),
        ((4, 168), (4, 255), (4, 168)),
    ),
    (4,): (
        ((8, 96), (8, 96), (8, 96)),
        ((8, 128), (4, 128), (8, 128)),
        ((4, 128), (4, 168), (4, 128)),
        ((4, 255), (4, 255), (2, 168)),
    ),
    (2, 2): (
        ((4, 96), (4, 96), (4, 96)),
        ((4, 128), (4, 128), (4, 128)),
        ((4, 168), (2, 168), (2, 168)),
        ((2, 255), (1, 255), (1, 255)),
    ),
    (2,): (
        ((4, 168), (4, 168), (4, 96)),
        ((4, 128), (4, 128), (4, 168)),
        ((2, 168), (2, 168), (2, 168)),
        ((2, 255), (1, 255), (1, 255)),
    ),
}
DOTS, BOTH, UPDATE = range(3)


def tile(V: Tensor, W: Tensor, kind: int) -> Tile:
    """The sizes for V and W. They do not depend on the number of V's rows, nor do the sums."""
    power = (W.shape[0] - 1).bit_length()
    aligned = _aligned(V, V.stride(0)) and _aligned(W, W.stride(0) if W.shape[0] > 1 else 0)
    parts = max(1, W.itemsize // V.itemsize) if aligned else 0
    lines = TABLE.get((V.itemsize, parts)) or TABLE[V.itemsize,]
    BK, registers = lines[power][kind]
    return Tile(THREADS, 16 // V.itemsize, 1 << power, BK, registers, parts)


def _aligned(A: Tensor, ld: int) -> bool:
    """Whether the rows of A start at multiples of 16 bytes."""
    return ld * A.itemsize % 16 == 0 and A.data_ptr() % 16 == 0


class LogitsTile(NamedTuple):
    """The sizes of ``softmax.curvature``: rows, groups of F classes, threads of a program."""

    R: int
    T: int
    F: int
    threads: int

    @property
    def registers(self) -> int:
        """The limit per thread, for 1,024 or 512 threads per multiprocessor."""
        return 64 if self.threads > THREADS else 128


def logits_tile(U: Tensor, unit: int, programs: int | None) -> LogitsTile:
    """The tile for U (outer, classes, inner), whose lines are aligned to ``unit`` numbers.

    ``programs`` limits the number of programs in the interpreter, where each is slow.
    """
    outer, classes, inner = U.shape
    F = 16 // U.itemsize
    groups = power(-(-classes // F))
    if programs is not None:
        R = power(-(-outer // programs) if inner == 1 else inner)
        return LogitsTile(R, power(-(-groups // programs)), F, THREADS)
    if inner == 1:  # few long rows at a time, so that the second pass finds them in the cache
        threads = THREADS if classes < 8192 else 4 * THREADS
        T = min(groups, threads)
        return LogitsTile(threads // T, T, F, threads)
    R = min(power(inner), THREADS * unit)
    return LogitsTile(R, min(groups, max(1, THREADS // R)), F, THREADS)
