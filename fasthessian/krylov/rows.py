"""The rows that a Lanczos run works on: random candidates, projections, and the scale of A."""

from __future__ import annotations

import math
from types import ModuleType
from typing import TypeVar

import torch
from torch import Tensor

from fasthessian.krylov.basis import Basis
from fasthessian.krylov.coefficients import Ledger
from fasthessian.krylov.dots import dots, gram
from fasthessian.operators.base import SymmetricOperator

X = TypeVar("X", float, Tensor)
LEAST = 2.0**-40  # norm of A, or its inverse, at which products are scaled: squares are far from 0
SKEWED = 8  # times eps ||T||: measured 0.1 to 0.5 where products err by rounding, 25 at 1e-5


class Rows:
    """The basis and the working rows of a run; see ``Lanczos``."""

    A: SymmetricOperator
    kernels: ModuleType
    basis: Basis
    ledger: Ledger
    W: Tensor
    T: Tensor
    seed: int
    size: int
    delayed: bool
    _u: int
    _drawn: int
    _factor: float | None
    _skew: float
    _dropped: float

    def combine(self, S: Tensor, out: Tensor) -> None:
        """``out = S^T V`` for S (size, p) and out (p, n)."""
        self.basis.rotate(S, out)

    def project_out_(self, w: Tensor) -> None:
        """Subtract from w (1, n) its parts along the rows."""
        C, _ = self.basis.dots(w, count=self.size)
        self.basis.update_(w, self.basis.coefficients(C), count=self.size)

    def add_candidate_(self, w: Tensor, factor: float, v: Tensor) -> None:
        """Add ``factor (q v) q`` to w (1, n) for v (1, n), q the candidate's direction."""
        u = self.W[self._u][None]
        C, _ = dots(self.kernels, u, v)
        G = gram(self.kernels, u)
        self.kernels.update_(u, w, torch.where(G > 0, -factor * C / G, 0.0))

    @property
    def exact(self) -> bool:
        """Whether products err by rounding alone, as far as is known or shows in T.

        Errors that are spread over n numbers show in the asymmetry of T as their n^(-1/2)th part.
        """
        eps = torch.finfo(self.A.dtype).eps
        shown = SKEWED * eps * float(self.T.abs().max()) + self._dropped
        return self.A._relative_error() <= eps and self._skew <= shown

    def next_offset(self) -> int:
        """Where the next n elements of the seed's stream begin that no vector was read from."""
        offset = self._drawn
        self._drawn += self.A.n
        return offset

    def _chosen_factor(self, w: Tensor) -> float:
        """A power of 2 by which products are multiplied, so that ||A||^2 is in W's range."""
        size = math.sqrt(float(gram(self.kernels, w)))
        extreme = math.isfinite(size) and size > 0 and not LEAST < size < 1 / LEAST
        return 2.0 ** -max(-126, min(126, math.floor(math.log2(size)))) if extreme else 1.0

    def _scale_(self, w: Tensor) -> None:
        if self._factor not in (None, 1.0):
            w.mul_(self._factor)

    def _unscaled(self, x: X) -> X:
        """From the units of T to those of A."""
        return x if self._factor in (None, 1.0) else x / self._factor

    def _draw(self, signs: bool) -> None:
        """A random unit candidate from the next n elements of the stream."""
        row, size = self.W[self._u][None], self.size
        fill = self.kernels.signs_ if signs else self.kernels.normal_
        fill(row[0], self.seed, self.next_offset())
        for _ in range(2 if size else 0):
            self.project_out_(row)
        G = gram(self.kernels, row)
        none = torch.zeros(0, 1, dtype=torch.float64, device=row.device)
        self.kernels.update_(row[:0], row, none, G.rsqrt())
        if not self.delayed:
            self.basis.store(size, row[0])
        self.ledger.candidate(size, 1.0)
