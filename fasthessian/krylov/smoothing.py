"""From Gauss rules to a smoothed density on a grid, with a pointwise band."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fasthessian.errors import ConvergenceWarning
from fasthessian.krylov.quadrature import (
    REACH,
    TOGETHER,
    Measured,
    Rule,
    quadrature,
    unresolved,
    width,
)
from fasthessian.results.records import Density

FINENESS = 4  # grid points per kernel width: the sum of a sampled Gaussian is then exact to 1e-16
MAX_GRID = 1 << 18
BAND = 1.96  # standard errors in the band


def smoothed(
    runs: list[Measured], n: int, steps: int, sigma: float | None, matvecs: int
) -> tuple[Density, list[Warning]]:
    """The density of an operator of size n from runs of ``steps`` steps, and its shortfalls.

    Args:
        runs: one per probe.
        n: size of the operator.
        steps: that were asked for; shorter runs are padded by nodes of weight 0.
        sigma: width of the kernel; None for the default of `density`.
        matvecs: products that the runs took, for the record.
    """
    matrices, resolution = [run.jacobi for run in runs], max(run.resolution for run in runs)
    full = [quadrature(run.jacobi, run.ended and not run.resolution) for run in runs]
    half = [
        rule if rule.exact else quadrature(T[: (len(T) + 1) // 2, : (len(T) + 1) // 2], False)
        for rule, T in zip(full, matrices, strict=True)
    ]

    low = min(float(rule.nodes[0]) for rule in full)
    high = max(float(rule.nodes[-1]) for rule in full)
    if sigma is None:
        size = max(abs(low), abs(high)) or 1.0
        resolved = sum(map(width, full)) / len(full)
        sigma = max(0.005 * (high - low), resolved, 1e-4 * size)
    shortfalls: list[Warning] = []
    finest = (high - low) * FINENESS / (MAX_GRID - 2 * REACH * FINENESS - 2)
    if sigma < finest:
        shortfalls.append(
            UserWarning(
                f"sigma={sigma:.3g} needs more than {MAX_GRID} grid points for the range "
                f"[{low:.4g}, {high:.4g}]; {finest:.3g} is used, nodes and weights are unaffected"
            )
        )
        sigma = finest
    if sigma < resolution:
        shortfalls.append(
            ConvergenceWarning(
                f"the float16 basis ended after {min(map(len, matrices))} of {steps} steps: what "
                f"was left is within its rounding, and eigenvalues closer than {resolution:.3g} "
                f"may share a node; with sigma={sigma:.3g} take basis='full', or a sigma of at "
                f"least {resolution:.3g}"
            )
        )
    grid = _grid(low, high, sigma)
    values = _smooth(full, grid, sigma)
    lower, upper = _band(full, half, grid, values, sigma, n)
    found = Density(
        nodes=torch.stack([_padded(rule.nodes, steps, float(rule.nodes[-1])) for rule in full]),
        weights=torch.stack([_padded(rule.weights, steps, 0.0) for rule in full]),
        grid=grid,
        values=values,
        lower=lower,
        upper=upper,
        sigma=sigma,
        matvecs=matvecs,
        graph="; ".join(dict.fromkeys(run.graph for run in runs)),
    )
    return found, shortfalls


def _band(
    full: list[Rule], half: list[Rule], grid: Tensor, values: Tensor, sigma: float, n: int
) -> tuple[Tensor, Tensor]:
    """Lower and upper edge: what the rules do not resolve, and the chance of the probes."""

    def mean(width: float) -> Tensor:
        return torch.stack([unresolved(rule, grid, width) for rule in full]).mean(0)

    missed = mean(sigma)
    steps = torch.hypot(missed, values - _smooth(half, grid, sigma))
    # K_sigma^2 = K_(sigma / sqrt 2) / (2 sqrt(pi) sigma), so tr(f^2) / n is a density too
    finer = sigma / math.sqrt(2)
    narrow = (_smooth(full, grid, finer) + mean(finer)) / (2 * math.sqrt(math.pi) * sigma)
    # The variance of the curve X about the truth phi is v * phi. Wilson's interval holds every phi
    # with (X - phi)^2 <= BAND^2 v phi; it also covers a peak that is a single eigenvalue. Each
    # eigenvalue is assumed to have at least a thousandth of its mean weight: without a floor any
    # gap might hide one (a probe gives it less in 2.5 % of the cases).
    floor = 1e-3 / (n * sigma * math.sqrt(2 * math.pi))
    curve = values + missed
    unit = BAND**2 * 2 * narrow / (n * len(full)) / curve.clamp(min=floor)
    spread = torch.sqrt(unit * curve + unit**2 / 4)
    lower = values - torch.hypot(steps, spread - unit / 2)
    return lower.clamp(min=0.0), values + torch.hypot(steps, spread + unit / 2)


def _grid(low: float, high: float, sigma: float) -> Tensor:
    points = math.ceil((high - low + 2 * REACH * sigma) / (sigma / FINENESS)) + 1
    return torch.linspace(
        low - REACH * sigma, high + REACH * sigma, points, dtype=torch.float64, device="cpu"
    )


def _smooth(rules: list[Rule], grid: Tensor, sigma: float) -> Tensor:
    """Mean over the rules of ``sum_i weight_i g(x - node_i)`` on the grid."""
    values = torch.zeros_like(grid)
    for rule in rules:
        columns = (torch.split(each, TOGETHER) for each in (rule.nodes, rule.weights))
        for nodes, weights in zip(*columns, strict=True):
            bells = torch.exp(-0.5 * ((grid - nodes[:, None]) / sigma) ** 2)
            values += (weights[:, None] * bells).sum(0)
    return values / (sigma * math.sqrt(2 * math.pi) * len(rules))


def _padded(x: Tensor, length: int, fill: float) -> Tensor:
    return torch.nn.functional.pad(x, (0, length - len(x)), value=fill)
