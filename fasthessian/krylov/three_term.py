r"""Lanczos without a basis: three vectors, for quadrature alone.

The three-term recurrence, from a unit vector q_0 and with q_(-1) = 0::

    w = A q_j - beta_(j-1) q_(j-1),  alpha_j = q_j'w,  w -= alpha_j q_j
    beta_j = |w|,  q_(j+1) = w / beta_j

Without reorthogonalisation converged Ritz values come back as copies ("ghosts") that share the
weight of their eigenvalue. The quadrature stays right (Greenbaum 1989; Chen, Trogdon, Ubaru 2021,
arXiv:2105.06595), but there are no Ritz vectors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fasthessian.errors import InputError
from fasthessian.krylov.basis import check_room
from fasthessian.krylov.breakdown import NOISE
from fasthessian.krylov.lockstep import Asking, answer
from fasthessian.krylov.space import Space
from fasthessian.krylov.state import ROWS, ThreeTermState
from fasthessian.operators.base import SymmetricOperator
from fasthessian.operators.request import Request


class ThreeTerm:
    """The tridiagonal T of a Krylov space from a random vector; see ``Lanczos``.

    Args:
        A: the operator.
        capacity: steps at most.
        seed, offset: of the stream that the start vector is drawn from.
        signs: start from random signs, else from normals.
        prepare: changes the start vector (1, n) in place, before it is normalised.
        restrict: changes the product w (1, n) of a vector q (1, n) in place: T is then that of the
            operator ``v -> restrict(A v)``.
        project: projects a row (1, n) in place into the subspace that this operator acts in.
        floor: norm of w up to which it is rounding, if more than T tells.
        backend: kernels by name; default the best that serves.
        deferred: enqueue steps without checking them; default on GPUs.
        state: to continue from, with its capacity, instead of from a start vector.

    Attributes:
        A, capacity: as given, capacity not above A.n.
        state: all that changes, see ``ThreeTermState``.
        resolution: nothing is lost to rows of less precision.
        graph: why steps are not replayed as a CUDA graph.
    """

    resolution = 0.0
    graph = "eager: steps without a basis are not captured"

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
        state: ThreeTermState | None = None,
    ) -> None:
        self.A, self.capacity = A, min(capacity, A.n)
        self._deferred = A.device.type == "cuda" if deferred is None else deferred
        self._space = Space(A, backend)
        self._restrict, self._project, self._floor = restrict, project, floor
        if state is not None:
            self.state, self.capacity = state, len(state.entries)
            return
        width = self._space.slice.width
        check_room("none", ROWS, width, A.dtype, A.dtype, A.device, A.device, 0)
        self.state = ThreeTermState.of(self.capacity, width, A.dtype, A.device)
        start = self.state.rows[:1]
        self._space.draw_(start[0], seed, offset, signs=signs)
        if prepare is not None:
            prepare(start)
        self._rescale(start, self._space.gram(start))

    def step(self) -> None:
        """One more row of T by a product of the operator; see ``advance``."""
        answer(self.advance())

    def advance(self) -> Asking:
        """Ask for one product and make one more row of T."""
        state, j = self.state, self.state.size
        before, q, w = (state.rows[i % 3 : i % 3 + 1] for i in (j - 1, j, j + 1))
        yield Request(self.A, q, w, self._deferred)
        if self._restrict is not None:
            self._restrict(q, w)
        if j:
            self._space.kernels.update_(before, w, state.entries[j - 1, 1:, None])
        alpha, _ = self._space.dots(q, w)
        _, beta2 = self._space.dots(q, w, alpha)
        state.entries[j] = torch.cat((alpha[0], beta2[0].sqrt()))
        self._rescale(w, beta2)
        if self._project is not None:  # the less is left of w, the more of it is rounding
            self._project(w)
        state.size += 1
        if not self._deferred:
            self._check()

    def poll(self, wait: bool) -> bool:
        """Check the steps made; without ``wait`` a GPU is left alone, and nothing new is known."""
        if self._deferred and wait:
            self._check()
        return wait or not self._deferred

    def close(self) -> None:
        """Free the rows; the state is unusable afterwards."""
        del self.state.rows

    def _check(self) -> None:
        """Read the entries since the last check: for NaN, and for the end of the space."""
        state = self.state
        new = state.entries[state.judged : state.size].cpu()
        if not bool(torch.isfinite(new).all()):
            raise InputError(f"{self.A} returned NaN or Inf for a finite vector")
        eps = torch.finfo(self.A.dtype).eps
        for i, (alpha, beta) in enumerate(new.abs().tolist()):
            state.norm = max(state.norm, alpha + beta)
            if beta <= max(NOISE * eps * state.norm, self._floor):
                state.size, state.exhausted = state.judged + i + 1, True
                break
        state.judged = state.size

    @property
    def size(self) -> int:
        """Steps made."""
        return self.state.size

    @property
    def ended(self) -> bool:
        """Whether an invariant subspace was met."""
        return self.state.exhausted

    def entries(self, first: int) -> list[tuple[float, float]]:
        """Rows of T from ``first`` on: (alpha_j, beta_j)."""
        return [(a, b) for a, b in self.state.entries[first : self.size].tolist()]

    def jacobi(self) -> Tensor:
        """The Jacobi matrix of the start vector: T (size, size) float64 on the CPU."""
        alpha, beta = self.state.entries[: self.size].cpu().unbind(1)
        return torch.diag(alpha) + torch.diag(beta[:-1], 1) + torch.diag(beta[:-1], -1)

    def _rescale(self, row: Tensor, norm2: Tensor) -> None:
        """Divide a row (1, n) by its norm, unless that is 0."""
        none = torch.zeros(0, 1, dtype=torch.float64, device=row.device)
        S = torch.where(norm2 > 0, norm2, torch.inf).rsqrt()
        self._space.kernels.update_(row[:0], row, none, S)
