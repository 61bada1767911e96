"""Lanczos without a basis: three vectors, for quadrature alone.

Without reorthogonalisation converged Ritz values come back as copies ("ghosts"), which share the
weight of their eigenvalue: the quadrature stays right (Greenbaum 1989; Chen, Trogdon, Ubaru 2021,
arXiv:2105.06595), the Ritz vectors are gone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fasthessian import kernels
from fasthessian.errors import InputError
from fasthessian.krylov.basis import check_room
from fasthessian.krylov.dots import dots, gram
from fasthessian.krylov.lanczos import NOISE
from fasthessian.krylov.lockstep import Asking, answer
from fasthessian.operators.base import SymmetricOperator
from fasthessian.operators.request import Request
from fasthessian.vectors import empty_rows

ROWS = 3


class ThreeTerm:
    """The tridiagonal T of a Krylov space from a random vector; see ``Lanczos``.

    Args:
        A: the operator.
        capacity: steps at most.
        seed: of the stream that the start vector is read from.
        offset: where in the stream.
        signs: start from random signs, else from normals.
        prepare: changes the start vector (1, n), before it is normalised.
        restrict: changes the product w (1, n) of a vector q (1, n): T is then that of the operator
            ``v -> restrict(A v)``.
        project: projects a row (1, n) into the subspace that this operator acts in.
        floor: norm of a product's new part under which it is rounding, if more than T tells.
        backend: kernels by name; default the best that serves.
        deferred: enqueue steps without looking at them; default on GPUs.

    Attributes:
        T: (size, size) float64 on the CPU.
        size, capacity: steps made, and at most.
        exhausted: an invariant subspace was met.
        blur: nothing is lost to rows of less precision.
        replay: why steps are not replayed as a CUDA graph.
    """

    blur = 0.0
    replay = "eager: steps without a basis are not captured"

    def __init__(
        self,
        A: SymmetricOperator,
        capacity: int,
        *,
        seed: int,
        offset: int = 0,
        signs: bool = True,
        prepare: Callable[[Tensor], None] | None = None,
        restrict: Callable[[Tensor, Tensor], None] | None = None,
        project: Callable[[Tensor], None] | None = None,
        floor: float = 0.0,
        backend: str | None = None,
        deferred: bool | None = None,
    ) -> None:
        self.A, self.capacity, self.size = A, min(capacity, A.n), 0
        self.exhausted = False
        self._seen, self._largest = 0, 0.0
        self._deferred = A.device.type == "cuda" if deferred is None else deferred
        self._kernels = kernels.select(A.device, backend)
        check_room("none", ROWS, A.n, A.dtype, A.dtype, A.device, A.device, 0)
        self._rows = empty_rows(ROWS, A.n, A.dtype, A.device)  # q_j in row j mod 3
        # row j: the diagonal entry, and the coupling to row j + 1
        self._entries = torch.zeros(self.capacity, 2, dtype=torch.float64, device=A.device)
        self._restrict, self._project, self._floor = restrict, project, floor
        fill = self._kernels.signs_ if signs else self._kernels.normal_
        start = self._rows[:1]
        fill(start[0], seed, offset)
        if prepare is not None:
            prepare(start)
        self._rescale(start, gram(self._kernels, start))

    def step(self) -> None:
        """One more row of T by a product of the operator; see ``advance``."""
        answer(self.advance())

    def advance(self) -> Asking:
        """Ask for one product and make one more row of T, unless the space is exhausted."""
        j, rows, serve = self.size, self._rows, self._kernels
        q, w = (rows[i % 3][None] for i in (j, j + 1))
        yield Request(self.A, q, w, self._deferred)
        if self._restrict is not None:
            self._restrict(q, w)
        if j:
            serve.update_(rows[(j - 1) % 3][None], w, self._entries[j - 1, 1:, None])
        C, _ = dots(serve, q, w)
        _, G = dots(serve, q, w, C)
        self._entries[j] = torch.cat((C[0], G[0].sqrt()))
        self._rescale(w, G)
        if self._project is not None:  # the less is left, the more of it is rounding
            self._project(w)
        self.size += 1
        if not self._deferred:
            self._read()

    def look(self, wait: bool) -> bool:
        """Refresh T; without ``wait`` a GPU is left alone."""
        if self._deferred and wait:
            self._read()
        return wait or not self._deferred

    def close(self) -> None:
        """Give back the rows."""
        del self._rows

    def _read(self) -> None:
        """Look at the entries since the last look: for NaN, and for the end of the space."""
        fresh = self._entries[self._seen : self.size].cpu()
        if not bool(torch.isfinite(fresh).all()):
            raise InputError(f"{self.A} returned NaN or Inf for a finite vector")
        eps = torch.finfo(self.A.dtype).eps
        for i, (diagonal, beside) in enumerate(fresh.abs().tolist()):
            self._largest = max(self._largest, diagonal + beside)
            if beside <= max(NOISE * eps * self._largest, self._floor):
                self.size, self.exhausted = self._seen + i + 1, True
                break
        self._seen = self.size

    @property
    def ended(self) -> bool:
        """Whether an invariant subspace was met."""
        return self.exhausted

    def entries(self, first: int) -> list[tuple[float, float]]:
        """Rows of T from ``first`` on, up to the last look: diagonal, and coupling to the next."""
        return [(a, b) for a, b in self._entries[first : self.size].tolist()]

    def jacobi(self) -> Tensor:
        """The Jacobi matrix of the start vector: T (size, size) float64 on the CPU."""
        diagonal, beside = self._entries[: self.size].cpu().unbind(1)
        return torch.diag(diagonal) + torch.diag(beside[:-1], 1) + torch.diag(beside[:-1], -1)

    def _rescale(self, row: Tensor, norm2: Tensor) -> None:
        none = torch.zeros(0, 1, dtype=torch.float64, device=row.device)
        S = torch.where(norm2 > 0, norm2, torch.inf).rsqrt()
        self._kernels.update_(row[:0], row, none, S)
