"""The sizes that the Triton kernels are compiled for."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

THREADS = 128  # threads per program


def power(number: int, least: int = 1) -> int:
    """The smallest power of two that is at least ``number`` and ``least``."""
    return max(least, 1 << (number - 1).bit_length())


class Tile(NamedTuple):
    """The sizes of ``rows.project`` and ``rows.update``."""

    T: int  # groups of F numbers, one per thread
    F: int  # numbers of V in 16 bytes
    B: int  # rows of W, rounded up to a power of two
    BK: int  # rows of V at a time; each thread loads 16 bytes of each at once
    registers: int  # limit per thread: with 128, the 65,536 of a multiprocessor serve 512 threads
    parts: int  # 16-byte loads for F numbers of W; 0 if a row of V or W is not aligned


# Keys: bytes per number of V and, if it matters, ``parts``. Lines: 1, 2, 4 and 8 rows of W.
# Columns: (BK, registers) of project without H, of project with H, and of update. With more
# registers, fewer threads run at a time. With a lower BK, each thread has fewer loads in flight.
# None of these kernels spills (tests/kernels/test_triton_aot.py). The number of tiles per program
# depends on the length n (`_cut` in backend.py). Nothing depends on the number of rows k, because a
# captured step serves every k. ``make tune`` compares these sizes with others, by k, n and type.
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
    """The sizes for V and W. Neither they nor the order of sums depend on V's number of rows."""
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
    """The sizes of ``softmax.curvature``: rows, groups of F classes, threads per program."""

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
    if inner == 1:  # few long rows at a time, so that they are in the cache for the second pass
        threads = THREADS if classes < 8192 else 4 * THREADS
        T = min(groups, threads)
        return LogitsTile(threads // T, T, F, threads)
    R = min(power(inner), THREADS * unit)
    return LogitsTile(R, min(groups, max(1, THREADS // R)), F, THREADS)
