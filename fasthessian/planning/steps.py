"""The counts of one Lanczos step on several ranks: collectives, bytes moved, and memory.

A product is a sum over the ranks. The rows of the basis are replicated, or each rank has a slice of
every row (sharded). P ranks, n parameters, j rows so far, v bytes per number of a vector:

=============  ===========================================================================
replicated     product: all-reduce of n numbers
sharded        next vector: all-gather of slices; product: reduce-scatter; scalars: all-gather
=============  ===========================================================================

The scalars of a dcgs2 step (see ``krylov.lanczos``) are the j x 2 dots with the rows and the 3
different dots of the candidate and its product, in float64. A step of the three-term recurrence
(see ``krylov.three_term``) has two groups of 2, one after the other.

Bytes that a rank sends are those of the ring algorithms (Thakur, Rabenseifner, Gropp 2005,
Optimization of collective communication operations in MPICH): no algorithm sends fewer.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from fasthessian.distributed.slices import slice_width
from fasthessian.errors import InputError

PARAMETERS = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}  # bytes per parameter
BASES = ("full", "compressed", "offload", "none")
FLOAT64 = 8
DELAYED_DOTS = 3  # of dcgs2: u'u, u'w, w'w
THREE_TERM_DOTS = 2  # for alpha: q'w, w'w; for beta the same
DELAYED_VECTORS, THREE_TERM_VECTORS = 7, 10  # read or written per step outside the basis
COMPRESSED = 2  # bytes of float16
BUFFER = 1 << 30  # bytes of a buffer of an offloaded basis at most; see ``krylov.basis``


class Collective(NamedTuple):
    """A collective, and the bytes of the tensor that each rank hands to it.

    Example:
        >>> Collective("all_reduce", 400).sent(4)
        600.0
    """

    name: str  # "all_reduce", "reduce_scatter" or "all_gather"
    payload: int

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends: payload times 2 (P-1)/P, (P-1)/P or P-1."""
        others = ranks - 1
        factor = {"all_reduce": 2 * others / ranks, "reduce_scatter": others / ranks}
        return self.payload * factor.get(self.name, others)


def vector_bytes(dtype: str) -> int:
    """Bytes per number of a vector: float64 for parameters in float64, otherwise float32."""
    if dtype not in PARAMETERS:
        raise InputError(f"dtype must be one of {', '.join(PARAMETERS)}, got {dtype!r}")
    return max(4, PARAMETERS[dtype])


def collectives(
    n: int, ranks: int, rows: int, dtype: str = "float32", *, sharded: bool, basis: str = "full"
) -> tuple[Collective, ...]:
    """The collectives of one step, in their order.

    Args:
        n: parameters.
        ranks: of the process group.
        rows: of the basis before the step.
        dtype: of the parameters.
        sharded: whether each rank has a slice of every vector.
        basis: how rows are kept, one of BASES.

    Example:
        >>> collectives(1000, 4, 10, sharded=False)
        (Collective(name='all_reduce', payload=4000),)
        >>> [tuple(each) for each in collectives(1000, 4, 10, sharded=True)]
        [('all_gather', 1024), ('reduce_scatter', 4096), ('all_gather', 184)]
    """
    v = vector_bytes(dtype)
    if not sharded:
        return (Collective("all_reduce", n * v),)
    part = slice_width(n, ranks) * v
    product = Collective("all_gather", part), Collective("reduce_scatter", ranks * part)
    if basis == "none":
        dots = Collective("all_gather", THREE_TERM_DOTS * FLOAT64)
        return (*product, dots, dots)
    return (*product, Collective("all_gather", (2 * rows + DELAYED_DOTS) * FLOAT64))


@dataclasses.dataclass(frozen=True)
class KrylovSize:
    """The Krylov space of a run: what its vectors take and move.

    Example:
        >>> space = KrylovSize(n=1000, ranks=4, steps=100, sharded=True)
        >>> space.basis_bytes, space.vectors_bytes
        (102400, 10240)
    """

    n: int  # parameters
    ranks: int = 1
    steps: int = 100  # of Lanczos: rows of the basis
    pairs: int = 0  # eigenvectors that are wanted
    dtype: str = "float32"  # of the parameters
    basis: str = "full"  # one of BASES
    sharded: bool = False

    @property
    def rows(self) -> int:
        """Steps that can be made: n at most."""
        return min(self.steps, self.n)

    @property
    def width(self) -> int:
        """Numbers of each vector of the space on one rank."""
        return slice_width(self.n, self.ranks) if self.sharded else self.n

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the basis on one rank; 0 without a basis."""
        numbers = {"none": 0, "compressed": COMPRESSED}
        return self.width * numbers.get(self.basis, vector_bytes(self.dtype))

    # memory of one rank

    @property
    def basis_bytes(self) -> int:
        """All rows of the basis on one rank, wherever they are."""
        return self.rows * self.row_bytes

    def buffers_bytes(self, memory: float | None) -> int:
        """The two buffers of an offloaded basis on the device, of ``memory`` bytes if known.

        A buffer takes a gibibyte or an eighth of the memory at most, and two rows at least.
        """
        if self.basis != "offload":
            return 0
        room = BUFFER if memory is None else min(BUFFER, int(memory) // 8)
        held = max(1, min(self.rows, room // self.row_bytes - 1))
        return 2 * (held + 1) * self.row_bytes

    @property
    def vectors_bytes(self) -> int:
        """The vectors outside the basis.

        The candidate and its product, or the three vectors of the three-term recurrence. If they
        are sharded, there are also the gathered vector and the local product, of full length.
        """
        v = vector_bytes(self.dtype)
        own = (3 if self.basis == "none" else 2) * self.width
        return v * (own + (2 * self.ranks * self.width if self.sharded else 0))

    @property
    def pairs_bytes(self) -> int:
        """The eigenvectors, sharded as the space is."""
        return self.pairs * self.width * vector_bytes(self.dtype)

    def device_bytes(self, memory: float | None = None) -> int:
        """What the space takes of a rank's device."""
        kept = self.buffers_bytes(memory) if self.basis == "offload" else self.basis_bytes
        return kept + self.vectors_bytes + self.pairs_bytes

    @property
    def host_bytes(self) -> int:
        """Pinned host memory of an offloaded basis: torch rounds it up to a power of two."""
        if self.basis != "offload":
            return 0
        return 1 << (self.basis_bytes - 1).bit_length()

    # traffic

    def streamed_bytes(self, rows: float) -> float:
        """Bytes of the basis that a step reads on each rank: two passes over its rows (dcgs2)."""
        return 2 * rows * self.row_bytes

    @property
    def moved_bytes(self) -> int:
        """Bytes of the other vectors that a step reads and writes.

        dcgs2: the candidate and the product are read twice, two vectors are written, and the check
        of a step reads the new candidate. Three-term recurrence: 3 + 2 + 3 + 2 in its four passes.
        """
        vectors = THREE_TERM_VECTORS if self.basis == "none" else DELAYED_VECTORS
        return vectors * self.width * vector_bytes(self.dtype)

    def collectives(self, rows: int) -> tuple[Collective, ...]:
        """The collectives of the step that has ``rows`` rows before it; none on one rank."""
        if self.ranks == 1:
            return ()
        return collectives(
            self.n, self.ranks, rows, self.dtype, sharded=self.sharded, basis=self.basis
        )

    @property
    def checkpoint_bytes(self) -> int:
        """A checkpoint after the last step, all ranks together: every vector of the run once."""
        v = vector_bytes(self.dtype)
        if self.basis == "none":
            return 3 * self.n * v
        stored = COMPRESSED if self.basis == "compressed" else v
        return self.n * (self.rows * stored + 2 * v)
