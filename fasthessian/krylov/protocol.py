"""What quadrature needs of a run, with a basis (``Lanczos``) or without one (``ThreeTerm``)."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from fasthessian.krylov.lockstep import Asking


class KrylovRun(Protocol):
    """A Krylov space that grows by one product per step, and its Jacobi matrix."""

    capacity: int  # steps at most

    @property
    def size(self) -> int:
        """Steps made."""

    @property
    def ended(self) -> bool:
        """Whether the space of the start vector ended, so that ``jacobi`` is all of it."""

    @property
    def resolution(self) -> float:
        """Eigenvalues closer than this may share a node; 0 where no precision was lost."""

    @property
    def graph(self) -> str:
        """Whether steps are replayed as a CUDA graph, or why not."""

    def advance(self) -> Asking:
        """Ask for one product and make one more step, unless the space has ended."""

    def poll(self, wait: bool) -> bool:
        """Refresh what is known of the steps made; False if nothing new is known."""

    def jacobi(self) -> Tensor:
        """The Jacobi matrix (j, j) of the start vector, float64 on the CPU, as of the last poll."""

    def close(self) -> None:
        """Free the rows."""
