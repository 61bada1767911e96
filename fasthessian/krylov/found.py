"""What a run of k wanted pairs found, with each pair's verdict."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fasthessian.errors import ConvergenceWarning
from fasthessian.results.records import Eigenpairs


class Found(NamedTuple):
    """What a run of k wanted pairs found, in their order: as `Eigenpairs`, with each's verdict."""

    values: Tensor  # (k,)
    vectors: Tensor  # (k, n)
    residuals: Tensor  # (k,)
    converged: Tensor  # (k,) bool
    complete: bool  # no wanted eigenvalue is missing, but for a chance of MISS
    graph: str

    def take(self, index: Tensor | slice) -> Found:
        """The pairs of an index (j,), or of a slice without copying the vectors."""
        return Found(
            self.values[index],
            self.vectors[index],
            self.residuals[index],
            self.converged[index],
            self.complete,
            self.graph,
        )

    def record(self, matvecs: int) -> Eigenpairs:
        """The pairs as a result, after so many products."""
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
        """A warning where some have not converged; ``rows`` is the argument that adds rows."""
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
