"""Which numbers of a flat vector each rank holds, if vectors are split over ranks."""

from __future__ import annotations

import math
from typing import NamedTuple

from fasthessian.distributed.ranks import ALONE, Ranks

ALIGN = 16  # numbers: slices start on cache lines, whatever their dtype


class Slice(NamedTuple):
    """The numbers ``first`` to ``first + held`` of vectors (n,), zero-padded to (width,).

    All ranks have the same ``width``, so that collectives have equal pieces. Only the last ranks
    have padding, and if n is small some of them hold nothing else.
    """

    n: int
    width: int
    first: int
    held: int
    ranks: Ranks  # that the vectors are split over; ``ALONE`` for whole vectors

    @classmethod
    def of(cls, n: int, ranks: Ranks = ALONE) -> Slice:
        """The slice of this rank; the whole vector, without padding, if the rank is alone."""
        if not ranks:
            return cls(n, n, 0, n, ranks)
        width = slice_width(n, ranks.size)
        first = min(ranks.rank * width, n)
        return cls(n, width, first, min(width, n - first), ranks)

    @property
    def padding(self) -> slice:
        """Where a vector (width,) is padded with zeros."""
        return slice(self.held, self.width)


def slice_width(n: int, size: int) -> int:
    """Numbers of a vector of n on each of ``size`` ranks, padding included."""
    return math.ceil(math.ceil(n / size) / ALIGN) * ALIGN
