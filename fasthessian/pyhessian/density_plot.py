"""PyHessian's ``density_plot`` module: the smoothed spectral density and its figure."""

from __future__ import annotations

import importlib
import math
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fasthessian.errors import InputError

# the names in PyHessian's module; matplotlib is imported when plt or mpl is used
_LAZY = {"mpl": "matplotlib", "plt": "matplotlib.pyplot"}
__all__ = ["density_generate", "gaussian", "get_esd_plot", "math", "np"]
if find_spec("matplotlib") is not None:
    __all__ += list(_LAZY)
_KERNEL_REACH = 5.0  # standard deviations on the grid; 3e-7 of the mass of an end node lies beyond


def __getattr__(name: str) -> Any:
    """Import matplotlib for ``plt`` and ``mpl``; a star import uses this too."""
    if name in _LAZY:
        return importlib.import_module(_LAZY[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def get_esd_plot(eigenvalues: ArrayLike, weights: ArrayLike) -> None:
    """Draw the density on a logarithmic axis and write ``example.pdf`` (needs matplotlib).

    Args:
        eigenvalues: nodes, one list per run, as ``hessian.density`` returns them.
        weights: weights of the same shape.
    """
    from matplotlib import pyplot as plt

    density, grids = density_generate(eigenvalues, weights)
    nodes = _real(eigenvalues, "eigenvalues")
    plt.semilogy(grids, density + 1e-7)
    plt.xlim(float(nodes.min()) - 1.0, float(nodes.max()) + 1.0)
    plt.xlabel("Eigenvalue", fontsize=14, labelpad=10)
    plt.ylabel("Density (log scale)", fontsize=14, labelpad=10)
    plt.tick_params(labelsize=12)
    plt.tight_layout()
    plt.savefig("example.pdf")


def density_generate(
    eigenvalues: ArrayLike,
    weights: ArrayLike,
    num_bins: int = 10000,
    sigma_squared: float = 1e-5,
    overhead: float = 0.01,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Smooth the weighted nodes with a Gaussian kernel and average the runs.

    Each value is the mean of the density over one cell of the grid, computed from the distribution
    function of the kernel. So every node keeps its mass even if the kernel is narrower than a cell.
    If the kernel is wider, the value is the density at the point to ``O((cell / sigma)^2)``.

    Args:
        eigenvalues: nodes ``(runs, steps)``.
        weights: weights ``(runs, steps)``, real or complex with a zero imaginary part.
        num_bins: number of grid points.
        sigma_squared: variance of the kernel, multiplied by the range of the nodes if that exceeds
            1.
        overhead: least distance between the outermost nodes and the ends of the grid.

    Returns:
        ``(density, grids)``, both ``(num_bins,)``; ``density.sum()`` times the step is 1.

    Raises:
        ValueError: the shapes differ, a number is not finite, or an option is out of range.
    """
    nodes, mass = _real(eigenvalues, "eigenvalues"), _real(weights, "weights")
    if nodes.shape != mass.shape:
        raise InputError(
            f"weights has shape {mass.shape} and eigenvalues {nodes.shape}; "
            "pass one weight per node"
        )
    if num_bins < 2:
        raise InputError(f"num_bins is {num_bins}; pass at least 2")
    if not sigma_squared > 0 or not overhead >= 0:
        raise InputError(
            f"sigma_squared is {sigma_squared} and overhead {overhead}; "
            "pass a positive variance and an overhead of at least 0"
        )
    low, high = float(nodes.min()), float(nodes.max())
    sigma = float(np.sqrt(sigma_squared * max(1.0, high - low + 2.0 * overhead)))
    margin = max(overhead, _KERNEL_REACH * sigma)
    grids = np.linspace(low - margin, high + margin, num=num_bins)
    step = grids[1] - grids[0]
    edges = torch.from_numpy(np.append(grids - step / 2, grids[-1] + step / 2))
    below = torch.zeros_like(edges)
    for row, share in zip(torch.from_numpy(nodes), torch.from_numpy(mass), strict=True):
        below += share @ torch.special.ndtr((edges - row[:, None]) / sigma)
    density = np.clip(np.diff(below.numpy()), 0.0, None)
    return density / (density.sum() * step), grids


def gaussian(x: Any, x0: Any, sigma_squared: float) -> Any:
    """Value at ``x0`` of the normal density with mean ``x`` and variance ``sigma_squared``."""
    return np.exp(-0.5 * (x0 - x) ** 2 / sigma_squared) / np.sqrt(2.0 * np.pi * sigma_squared)


def _real(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """Return ``values`` as float64 rows of real finite numbers."""
    rows: NDArray[np.float64] = np.atleast_2d(np.asarray(values)).real.astype(np.float64)
    if rows.ndim != 2 or rows.size == 0:
        raise InputError(f"{name} has shape {rows.shape}; pass one list of numbers per run")
    if not np.isfinite(rows).all():
        raise InputError(f"{name} holds NaN or infinity; pass finite numbers")
    return rows
