"""The k wanted Ritz pairs of a run, and whether each has converged."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fasthessian.errors import ConvergenceWarning
from fasthessian.results.records import Eigenpairs


class Found(NamedTuple):
    """The k wanted pairs in their order: the fields of `Eigenpairs`, and a verdict per pair."""

    values: Tensor  # (k,)
    vectors: Tensor  # (k, n)
    residuals: Tensor  # (k,)
    converged: Tensor  # (k,) bool
    complete: bool  # no wanted eigenvalue is missing, except with the probability MISS
    graph: str

    def take(self, index: Tensor | slice) -> Found:
        """The pairs at an index (j,); a slice does not copy the vectors."""
        return Found(
            self.values[index],
            self.vectors[index],
            self.residuals[index],
            self.converged[index],
            self.complete,
            self.graph,
        )

    def record(self, matvecs: int) -> Eigenpairs:
        """The pairs as a result, after ``matvecs`` products."""
        return Eigenpairs(
            values=self.values,
            vectors=self.vectors,
            residuals=self.residuals,
            converged=self.complete and bool(self.converged.all()),
            matvecs=matvecs,
            graph=self.graph,
        )

    def shortfalls(
        self, tol: float, matvecs: int, compressed: bool, rows: str = "ncv"
    ) -> list[Warning]:
        """A warning if some pairs have not converged; ``rows`` is the option that adds rows."""
        if bool(self.converged.all()):
            return [] if self.complete else [ConvergenceWarning(
                f"all {len(self.values)} eigenpairs converged to tol={tol:g}, but {matvecs} "
                f"products did not suffice to show that no eigenvalue between them is missing; "
                f"raise max_matvecs"
            )]  # fmt: skip
        way = f"raise max_matvecs or {rows}"
        if compressed:
            way = "raise max_matvecs or tol; residuals under 2e-4 ||A|| need basis='full'"
        return [
            ConvergenceWarning(
                f"{int(self.converged.sum())} of {len(self.values)} eigenpairs converged to "
                f"tol={tol:g} in {matvecs} products; {way}, or accept the residuals returned"
            )
        ]
