"""The frozen records that the algorithms return, and their fields."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Annotated

import torch
from torch import Tensor

from fasthessian.results.export import csv, vtp
from fasthessian.results.fields import FLOATING, OMITTED
from fasthessian.results.record import Record, write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NO_PATH = torch.zeros(2, 0, dtype=torch.float64, device="cpu")


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
class Trajectory(Record):
    """The plane that shows most of a path in parameter space, and the path on it."""

    directions: Annotated[Tensor, "k n", FLOATING, OMITTED]  # k = 2 orthonormal rows
    coordinates: Annotated[Tensor, "t k"]  # float64, of theta_i - theta along the directions
    ratios: Annotated[Tensor, "k"]  # float64, shares of the variance of all points, descending


@dataclasses.dataclass(frozen=True, eq=False)
class Landscape(Record):
    """Loss along one or two directions; ``losses[i, j]`` at ``alphas[i] d0 + betas[j] d1``."""

    alphas: Annotated[Tensor, "p", "ascending"]  # float64
    betas: Annotated[Tensor, "q", "ascending"]  # float64, empty for one direction
    losses: Annotated[Tensor, "p q?"]  # float64, (p,) for one direction
    trajectory: Annotated[Tensor, "two t?"] = NO_PATH  # float64, (2, t): alphas, betas of points

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the curve or the contours of the loss, and the trajectory (needs matplotlib).

        The scale is logarithmic if the losses span more than a factor of 100. Losses that are not
        finite are gaps.
        """
        from fasthessian.results.plots import plot_landscape

        return plot_landscape(self, ax)

    def to_csv(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the columns alpha, beta (for two directions) and loss, whole or not at all.

        One row per grid point; beta varies fastest. The numbers have all their digits.

        Raises:
            FileExistsError: ``path`` exists and ``overwrite`` is False.

        Example:
            >>> import tempfile, pathlib, torch, fasthessian as fh
            >>> ends = torch.tensor([-1.0, 1.0]).double()
            >>> line = fh.Landscape(alphas=ends, betas=ends[:0], losses=ends**2)
            >>> path = pathlib.Path(tempfile.mkdtemp(), "line.csv")
            >>> line.to_csv(path)
            >>> print(path.read_text(), end="")
            alpha,loss
            -1.0,1.0
            1.0,1.0
        """
        write_whole(path, csv(self), overwrite=overwrite)

    def to_vtp(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the surface (or curve) as VTK PolyData for ParaView, whole or not at all.

        The points are (alpha, beta, loss), with beta 0 for one direction. They have the arrays
        ``loss`` and ``log10_loss``, which is NaN where the loss is not positive. Points with a loss
        that is not finite are left out, with the cells around them. A trajectory is not written.

        Raises:
            FileExistsError: ``path`` exists and ``overwrite`` is False.

        Example:
            >>> import tempfile, pathlib, torch, fasthessian as fh
            >>> ends = torch.tensor([-1.0, 1.0]).double()
            >>> line = fh.Landscape(alphas=ends, betas=ends[:0], losses=ends**2)
            >>> path = pathlib.Path(tempfile.mkdtemp(), "line.vtp")
            >>> line.to_vtp(path)
            >>> path.read_text().splitlines()[0]
            '<?xml version="1.0"?>'
        """
        write_whole(path, vtp(self), overwrite=overwrite)
