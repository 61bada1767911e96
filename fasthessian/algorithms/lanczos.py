"""The Krylov engine that eigsh, density and the drop-in share.

One basis V of orthonormal rows, grown by one product a step, with full reorthogonalisation by one
of two schedules over the kernel contract:

* ``dcgs2`` (default): delayed classical Gram-Schmidt, two streams of V and one reduction a step.
  The candidate u is orthogonalised a second time together with the first time of w = H u
  (Bielich, Langou, Thomas, Swirydowicz, Yamazaki, Boman 2022, arXiv:2104.01253, for Arnoldi; here
  with the symmetric recurrence).
* ``cgs2``: classical Gram-Schmidt twice, three streams.

The candidate lives in the basis buffer behind the final rows, so nothing is ever copied.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fasthessian import kernels
from fasthessian.operators.base import ASYMMETRY, SymmetricOperator
from fasthessian.vectors import empty_rows

SCHEDULES = ("dcgs2", "cgs2")
COLUMNS = 1 << 16  # columns combined at a time: bounds the float64 temporaries of `combine`
NOISE = 16  # times eps ||T||: what rounding leaves of an exact zero, here and in residuals
CANCELLED = 1e-4  # share of |u|^2 outside the basis under which u holds no new direction


class Lanczos:
    """A growing orthonormal basis V of a Krylov space and the projection T = V H V^T.

    Attributes:
        V: (capacity + 2, n) rows; the first ``size`` are final, row ``size`` is the candidate.
        T: (capacity + 1, capacity + 1) float64 on the CPU; the leading size x size block is
            V H V^T: tridiagonal, but for an arrow after ``restart``.
        size: final rows.
        beta: norm of the candidate: H V^T = V^T T + beta q e_last^T.
        exhausted: the rows span the whole space, or an invariant subspace was met and
            ``refill`` is False.
    """

    def __init__(
        self,
        A: SymmetricOperator,
        capacity: int,
        *,
        seed: int,
        offset: int = 0,
        signs: bool = False,
        refill: bool = True,
        schedule: str = "dcgs2",
        backend: str | None = None,
    ) -> None:
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule must be one of {', '.join(SCHEDULES)}, got {schedule!r}")
        self.A, self.capacity, self.refill = A, min(capacity, A.n), refill
        self.kernels = kernels.select(A.device, backend)
        self.V = empty_rows(self.capacity + 2, A.n, A.dtype, A.device)
        self.T = torch.zeros(self.capacity + 1, self.capacity + 1, dtype=torch.float64)
        self.size = 0
        self.beta = 0.0
        self.exhausted = self.broke_down = False
        self._delayed = schedule == "dcgs2"
        self._eps = torch.finfo(A.dtype).eps
        self._seed, self._drawn = seed, offset
        # row `size` of T, but for its diagonal, is the candidate's norm times this
        self._link = torch.zeros(0, dtype=torch.float64)
        self._draw(signs)

    @property
    def noise(self) -> float:
        """The size under which a residual or a coupling is rounding: NOISE eps ||T||."""
        size = self.size
        return NOISE * self._eps * float(self.T[:size, :size].abs().sum(1).max()) if size else 0.0

    def step(self) -> None:
        """Make one product and one more final row, unless the space is exhausted."""
        if self.size >= self.capacity:
            raise ValueError(f"the basis is full at {self.capacity} rows; restart it")
        while not self.exhausted:
            if self._advance():
                self._look_for_breakdown()
                return
            self._replace_candidate()

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values ascending (j,), T's eigenvectors (j, j) in columns, residual norms (j,)."""
        T = self.T[: self.size, : self.size]
        values, S = torch.linalg.eigh(T)
        return values, S, self.beta * S[-1].abs()

    def combine(self, S: Tensor, out: Tensor) -> None:
        """``out = S^T V`` for S (size, p) and out (p, n); out may be the leading rows of V."""
        V, mix = self.V[: self.size], S.T.to(self.V.device)
        for start in range(0, V.shape[1], COLUMNS):
            out[:, start : start + COLUMNS] = mix @ V[:, start : start + COLUMNS].double()

    def restart(self, keep: Tensor) -> None:
        """Thick restart (Wu, Simon 2000): keep the Ritz vectors of the indices ``keep`` (p,)."""
        values, S, _ = self.ritz()
        p = len(keep)
        self.combine(S[:, keep], self.V[:p])
        self.V[p].copy_(self.V[self.size])
        self._link = self._link[-1] * S[-1, keep]
        self.T.zero_()
        self.T[range(p), range(p)] = values[keep]
        self.size = p

    def _advance(self) -> bool:
        """The product and the orthogonalisation; False if the candidate held nothing new."""
        j, V = self.size, self.V
        self.A.apply(V[j : j + 1], V[j + 1 : j + 2])
        if self._delayed:
            C, G = (x.cpu() for x in self.kernels.project_(V[:j], V[j : j + 2]))
            s, z, uu, uw = C[:, 0], C[:, 1], float(G[0, 0]), float(G[0, 1])
            nu2 = uu - float(s @ s)
            if not nu2 > CANCELLED * uu:
                return False
            nu, t = math.sqrt(nu2), (uw - float(s @ z)) / nu2
            mix = torch.tensor([[1 / nu, 0.0], [-t / nu, 1 / nu]], dtype=torch.float64)
            self.kernels.update_(V[:j], V[j : j + 2], C.to(V.device), mix.to(V.device))
            coupling = (z - self.T[:j, :j] @ s) / nu
            alpha = t - float(self._link @ s)
        else:
            nu, V = self.beta, V[: j + 1]
            W = self.V[j + 1 : j + 2]
            first, _ = self.kernels.project_(V, W)
            second, G = self.kernels.project_(V, W, first)
            self.kernels.update_(V, W, second)
            C = (first + second).cpu()[:, 0]
            coupling, alpha = C[:j], float(C[j])
        self._accept(nu, alpha, coupling)
        return True

    def _accept(self, nu: float, alpha: float, coupling: Tensor) -> None:
        j, T = self.size, self.T
        T[j, :j] = T[:j, j] = nu * self._link
        T[j, j] = alpha
        self.size = j + 1
        # q_i' H q_j was measured from both sides: the free symmetry check of the recurrence
        asymmetry = float((coupling - T[j, :j]).abs().max()) if j else 0.0
        scale = float(T[: j + 1, : j + 1].abs().max())
        if asymmetry > 10 * ASYMMETRY[self.A.dtype] * scale:
            raise ValueError(
                f"A is not symmetric: q_i'Aq_j and q_j'Aq_i differ by {asymmetry:.3g} "
                f"at a scale of {scale:.3g}; pass a symmetric operator"
            )
        self._link = torch.zeros(j + 1, dtype=torch.float64)
        self._link[j] = 1.0

    def _look_for_breakdown(self) -> None:
        """Measure the candidate; an invariant subspace ends the run or gets a fresh direction."""
        if self.size == self.A.n:
            self.beta, self.exhausted = 0.0, True
            return
        candidate = self.V[self.size : self.size + 1]
        _, G = self.kernels.project_(self.V[:0], candidate)
        self.beta = math.sqrt(float(G[0, 0]))
        if self.beta <= self.noise:
            self._replace_candidate()
        elif not self._delayed:
            self._scale(1 / self.beta)

    def _replace_candidate(self) -> None:
        self.broke_down = True
        self.beta = 0.0
        if not self.refill:
            self.exhausted = True
            return
        self._draw(signs=False)
        V, W = self.V[: self.size], self.V[self.size : self.size + 1]
        for _ in range(2):  # the fresh vector is orthogonalised twice, then has norm 1
            C, G = self.kernels.project_(V, W)
            self.kernels.update_(V, W, C)
        _, G = self.kernels.project_(V, W)
        self._scale(1 / math.sqrt(float(G[0, 0])))
        self._link.zero_()

    def _draw(self, signs: bool) -> None:
        """A random unit candidate from the next n elements of the stream."""
        row = self.V[self.size]
        fill = self.kernels.signs_ if signs else self.kernels.normal_
        fill(row, self._seed, self._drawn)
        self._drawn += self.A.n
        _, G = self.kernels.project_(self.V[:0], row[None])
        self._scale(1 / math.sqrt(float(G[0, 0])))

    def _scale(self, factor: float) -> None:
        W = self.V[self.size : self.size + 1]
        none = torch.zeros(0, 1, dtype=torch.float64, device=W.device)
        mix = torch.tensor([[factor]], dtype=torch.float64, device=W.device)
        self.kernels.update_(self.V[:0], W, none, mix)
