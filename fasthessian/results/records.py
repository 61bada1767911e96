"""The frozen records that the algorithms return, and their fields."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

from torch import Tensor

from fasthessian.results.fields import FLOATING, OMITTED
from fasthessian.results.record import Record

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclasses.dataclass(frozen=True, eq=False)
class Eigenpairs(Record):
    """Eigenvalues, eigenvectors and a bound on the error of each pair."""

    values: Annotated[Tensor, "k"]  # float64, in the order that `which` asks for
    vectors: Annotated[Tensor, "k n", FLOATING, OMITTED]  # unit rows, the operator's dtype
    residuals: Annotated[Tensor, "k", ">= 0"]  # float64, bounds on ||H v - theta v||
    converged: bool
    matvecs: Annotated[int, ">= 0"]
    graph: str = ""  # "captured" as a CUDA graph, or "eager: " and the reason

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the eigenvalues with their residuals as error bars (needs matplotlib)."""
        from fasthessian.results.plots import plot_eigenpairs

        return plot_eigenpairs(self, ax)


@dataclasses.dataclass(frozen=True, eq=False)
class Estimate(Record):
    """A Monte-Carlo mean with its standard error and confidence interval."""

    value: float
    stderr: Annotated[float, ">= 0"]
    interval: Annotated[tuple[float, float], "ascending"]  # (low, high) at `confidence`
    confidence: Annotated[float, "between 0 and 1"]
    samples: Annotated[Tensor, "s"]  # float64, quadratic forms v'Hv, or of batches; see ``trace``
    matvecs: Annotated[int, ">= 0"]
    converged: bool

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the running mean with its confidence band (needs matplotlib)."""
        from fasthessian.results.plots import plot_estimate

        return plot_estimate(self, ax)


@dataclasses.dataclass(frozen=True, eq=False)
class Density(Record):
    """Spectral density by stochastic Lanczos quadrature."""

    # float64, each row ascending; after a breakdown the last node repeats
    nodes: Annotated[Tensor, "probes steps", "ascending"]
    # float64, each row sums to 1; repeated nodes have weight 0
    weights: Annotated[Tensor, "probes steps", ">= 0"]
    grid: Annotated[Tensor, "g", "ascending"]  # float64, eigenvalue axis
    values: Annotated[Tensor, "g", ">= 0"]  # float64, density on the grid; sum(values) * step = 1
    lower: Annotated[Tensor, "g"]  # float64, pointwise band over the probes
    upper: Annotated[Tensor, "g"]  # float64
    sigma: Annotated[float, "> 0"]  # width of the Gaussian kernel, in units of the eigenvalues
    matvecs: Annotated[int, ">= 0"]
    graph: str = ""  # "captured" as a CUDA graph, or "eager: " and the reason

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the density on a logarithmic axis with its band (needs matplotlib)."""
        from fasthessian.results.plots import plot_density

        return plot_density(self, ax)


@dataclasses.dataclass(frozen=True, eq=False)
class Spectrum(Record):
    """Both ends of the spectrum, the trace and the density of one operator."""

    top: Eigenpairs  # the largest, descending
    bottom: Eigenpairs  # the smallest, ascending
    trace: Estimate
    density: Density
    matvecs: Annotated[int, ">= 0"]  # in total

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the density with the eigenvalues of both ends marked (needs matplotlib)."""
        from fasthessian.results.plots import plot_density

        known = [*self.top.values.tolist(), *self.bottom.values.tolist()]
        return plot_density(self.density, ax, eigenvalues=known)


@dataclasses.dataclass(frozen=True, eq=False)
class BlockSpectra(Record):
    """The outermost eigenvalue and the trace of each diagonal block, in the order of the model."""

    names: Annotated[tuple[str, ...], "b"]
    sizes: Annotated[Tensor, "b", ">= 0"]  # float64, parameters
    values: Annotated[Tensor, "b"]  # float64, the eigenvalue of largest magnitude
    residuals: Annotated[Tensor, "b", ">= 0"]  # float64, bounds on ||H v - theta v||
    traces: Annotated[Tensor, "b"]  # float64
    errors: Annotated[Tensor, "b", ">= 0"]  # float64, half-width of the trace's confidence interval

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the eigenvalues as bars, with the traces as numbers (needs matplotlib)."""
        from fasthessian.results.plots import plot_blocks

        return plot_blocks(self, ax)


@dataclasses.dataclass(frozen=True, eq=False)
class Landscape(Record):
    """Loss along one or two directions; ``losses[i, j]`` at ``alphas[i] d0 + betas[j] d1``."""

    alphas: Annotated[Tensor, "p", "ascending"]  # float64
    betas: Annotated[Tensor, "q", "ascending"]  # float64, empty for one direction
    losses: Annotated[Tensor, "p q?"]  # float64, (p,) for one direction

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the curve or the contour map of the loss (needs matplotlib)."""
        from fasthessian.results.plots import plot_landscape

        return plot_landscape(self, ax)
