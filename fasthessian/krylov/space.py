"""The space that a run works in: its vectors, their dot products, and the kernels for both.

The vectors may be split over ranks. A rank then works on its slices, and only dot products need the
other ranks: their sums are exchanged by one collective and added in the order of the ranks, so that
all ranks have the same bits. Random vectors are drawn by the positions of their numbers, so that
any number of ranks draws the same ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fasthessian import kernels
from fasthessian.kernels.contract import Count
from fasthessian.operators.base import SymmetricOperator
from fasthessian.vectors import empty_rows


class Space:
    """The space of the vectors of an operator.

    Args:
        A: the operator.
        backend: kernels by name; default the best that serves.

    Attributes:
        kernels: the backend.
        slice: which numbers of a vector are here.
        dtype, device: of the vectors.
    """

    def __init__(self, A: SymmetricOperator, backend: str | None = None) -> None:
        self.kernels = kernels.select(A.device, backend)
        self.slice, self.dtype, self.device = A.slice, A.dtype, A.device

    @property
    def n(self) -> int:
        """The dimension."""
        return self.slice.n

    @property
    def split(self) -> bool:
        """Whether vectors are split over ranks."""
        return bool(self.slice.ranks)

    def rows(self, k: int, dtype: torch.dtype | None = None) -> Tensor:
        """K zeroed vectors as rows (k, width), see ``empty_rows``."""
        return empty_rows(k, self.slice.width, dtype or self.dtype, self.device)

    def padded(self, rows: Tensor) -> Tensor:
        """Vectors (k, width) from rows (k, held) without the padding."""
        if rows.shape[1] == self.slice.width:
            return rows.contiguous()
        whole = self.rows(len(rows))
        whole[:, : self.slice.held] = rows
        return whole

    def held(self, rows: Tensor) -> Tensor:
        """The vectors (k, width) of whole ones (k, n)."""
        return self.padded(rows[:, self.slice.first : self.slice.first + self.slice.held])

    def draw_(self, v: Tensor, seed: int, offset: int, *, signs: bool) -> None:
        """Fill v (width,) with the numbers from ``offset`` on of the seed's stream."""
        fill = self.kernels.signs_ if signs else self.kernels.normal_
        fill(v, seed, offset + self.slice.first)
        v[self.slice.padding] = 0

    def dots(
        self, V: Tensor, W: Tensor, H: Tensor | None = None, *, count: Count = None
    ) -> tuple[Tensor, Tensor]:
        """``C = V W^T`` (k, b) and ``G = W W^T`` (b, b) in float64, one pass over V and W.

        No other function of the engine calls ``project_``, and no caller adds up dots itself: this
        is the place where the ranks are summed, by one collective of ``count b + b (b + 1) / 2``
        numbers.

        Args:
            V: rows (k, width).
            W: rows (b, width), b up to 8.
            H: (k, b); if given, ``W -= H^T V`` is done first, in place.
            count: rows of V that take part, default all; C is 0 beyond them.
        """
        C, G = self.kernels.project_(V, W, H, count=count)
        if self.split:
            used = C[:count] if isinstance(count, int) else C
            upper = torch.triu_indices(len(G), len(G), device=G.device).unbind()
            total = self.slice.ranks.sum_in_order(torch.cat((used.reshape(-1), G[upper])))
            used.copy_(total[: used.numel()].view(used.shape))
            G[upper] = G.T[upper] = total[used.numel() :]
        return C, G

    def gram(self, W: Tensor) -> Tensor:
        """``G = W W^T`` (b, b) alone."""
        return self.dots(W[:0], W)[1]
