"""Spectral density by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from fasthessian.arguments import Progress, integer, positive, seed_of
from fasthessian.errors import ConvergenceWarning, InputError, InsufficientMemoryError
from fasthessian.krylov.basis import FORMATS
from fasthessian.krylov.lanczos import Lanczos
from fasthessian.krylov.lockstep import Run, solve
from fasthessian.krylov.quadrature import REACH, Rule, quadrature, unresolved, width
from fasthessian.krylov.three_term import ROWS, ThreeTerm
from fasthessian.memory import available_bytes, readable
from fasthessian.operators.base import SymmetricOperator
from fasthessian.operators.request import Request
from fasthessian.results.records import Density
from fasthessian.vectors import stride_bytes

FINENESS = 4  # grid points a kernel width: the sum of a sampled Gaussian is then exact to 1e-16
MAX_GRID = 1 << 18
LOOK = 16  # steps between two looks at a GPU's run
BAND = 1.96  # standard errors in the band


@overload
def density(A: SymmetricOperator, **options: Any) -> Density: ...


@overload
def density(A: Mapping[str, SymmetricOperator], **options: Any) -> dict[str, Density]: ...


def density(  # type: ignore[misc]  # the overloads leave the options to this one
    A: SymmetricOperator | Mapping[str, SymmetricOperator],
    *,
    steps: int = 100,
    probes: int = 1,
    sigma: float | None = None,
    seed: int = 0,
    schedule: str = "dcgs2",
    backend: str | None = None,
    basis: str = "full",
    graph: bool = True,
    progress: Progress | None = None,
) -> Density | dict[str, Density]:
    r"""The eigenvalue density ``phi(x) = 1/n sum_i g(x - lambda_i)``, g Gaussian of width sigma.

    Stochastic Lanczos quadrature (Golub and Welsch 1969; Lin, Saad, Yang 2016; Ghorbani,
    Krishnan, Xiao 2019): from each random start, Ritz values are nodes and squared first
    components of T's eigenvectors are weights.

    The band is pointwise, at 95 %. It adds in quadrature three parts: the chance of the probes, as
    Wilson's interval (1927) with the variance of quadratic forms ``2 tr(f(A)^2) / (n^2 probes)``,
    f the kernel, so that it holds for one probe too; what the nodes do not resolve (see
    ``resolution``: a rigorous bound for a kernel finer than their spacing); and the change from
    half the steps. The last two are 0 where the Krylov space has ended.

    Args:
        A: the operator, size n; or operators by name such as ``A.blocks("layer")``, which advance
            together, and a dictionary of results is returned.
        steps: Lanczos steps and products a probe, at least 1. Memory: steps rows of the basis and
            two vectors.
        probes: random starts, at least 1; one is enough for n above about 1e7.
        sigma: width of the kernel, in units of the eigenvalues; default 0.5 % of their range, or
            the mean spacing of the nodes, weighted by the density, where that is more (2.6 % for
            a semicircle at 50 steps). Of one much finer than the nodes the band says how little is
            known. One too fine for 2^18 grid points is widened, with a warning.
        seed: probe p starts from elements p n .. (p + 1) n of the seed's stream of signs.
        schedule: orthogonalisation, "dcgs2" or "cgs2".
        backend: kernels by name; default the best that serves.
        basis: "full" rows in the operator's dtype; "compressed" float16 rows, half the memory of
            float32, nodes good to about 1e-3 ||A||, with a warning where that loses some and sigma
            is finer; "offload" rows in host memory, for a GPU; "none" keeps no basis, three
            vectors in all: quadrature stays right, though converged nodes come back as copies.
        graph: on a GPU, replay a step as a CUDA graph where it can be captured.
        progress: called with (products done, steps * probes at most) after each.

    Returns:
        Density: nodes and weights (probes, steps) - where the Krylov space ends early, the last
        node repeats with weight 0 - and values with a band on a grid finer than the kernel; graph
        says whether steps were "captured", or "eager: " and why.

    Raises:
        ValueError, TypeError: an argument is out of range, or A is not symmetric.
        MemoryError: the basis does not fit; the message says what would.

    Example:
        >>> import torch, fasthessian as fh
        >>> A = fh.SymmetricOperator(lambda v: torch.arange(1.0, 101.0) * v, 100)
        >>> d = fh.density(A, steps=20)
        >>> round(float((d.nodes * d.weights).sum()), 3)
        50.5
    """
    steps, probes = integer("steps", steps, 1), integer("probes", probes, 1)
    sigma = None if sigma is None else positive("sigma", sigma)
    seed = seed_of(seed)
    if basis not in (*FORMATS, "none"):
        raise InputError(f"basis must be one of {', '.join(FORMATS)}, none, got {basis!r}")

    def start(B: SymmetricOperator, told: Progress | None) -> Run[Density]:
        def krylov(probe: int) -> Lanczos | ThreeTerm:
            options: dict[str, Any] = {"seed": seed, "offset": probe * B.n, "backend": backend}
            if basis == "none":
                return ThreeTerm(B, steps, **options)
            options |= {"schedule": schedule, "basis": basis, "graph": graph}
            try:
                return Lanczos(B, steps, signs=True, refill=False, **options)
            except MemoryError as error:
                needs = ROWS * stride_bytes(B.n, B.dtype)
                if needs > available_bytes(B.device):
                    raise
                raise InsufficientMemoryError(
                    f"{error}, or basis='none' needs {readable(needs)}"
                ) from None

        return _run(B, krylov, steps, probes, sigma, told)

    return solve(A, start, progress)


def _run(
    A: SymmetricOperator,
    begin: Callable[[int], Lanczos | ThreeTerm],
    steps: int,
    probes: int,
    sigma: float | None,
    progress: Progress | None,
) -> Run[Density]:
    start, total = A.matvecs, probes * min(steps, A.n)

    def told() -> None:
        if progress is not None:
            progress(A.matvecs - start, total)

    runs = []
    for probe in range(probes):
        krylov = begin(probe)
        runs.append((yield from grow(krylov, steps, told)))
        krylov.close()
    return smoothed(runs, A.n, steps, sigma, A.matvecs - start)


class Measured(NamedTuple):
    """What quadrature takes from a run: ``jacobi``, ``blur``, ``replay`` and ``ended``."""

    jacobi: Tensor
    blur: float
    replay: str
    ended: bool = False


def grow(
    krylov: Lanczos | ThreeTerm, steps: int, told: Callable[[], None]
) -> Generator[Request, None, Measured]:
    """Make ``steps`` rows, or fewer where the space of the start vector ends."""
    while krylov.size < min(steps, krylov.capacity) and not krylov.ended:
        yield from krylov.advance()
        last = krylov.size >= min(steps, krylov.capacity) or krylov.ended
        if last or krylov.size % LOOK == 0:
            krylov.look(wait=last)
        told()
    return Measured(krylov.jacobi(), krylov.blur, krylov.replay, krylov.ended)


def smoothed(
    runs: list[Measured], n: int, steps: int, sigma: float | None, matvecs: int
) -> tuple[Density, list[Warning]]:
    """The density of an operator of size n from runs of ``steps`` steps, and its shortfalls."""
    matrices, blur = [run.jacobi for run in runs], max(run.blur for run in runs)
    full = [quadrature(run.jacobi, run.ended and not run.blur) for run in runs]
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
    if sigma < blur:
        shortfalls.append(
            ConvergenceWarning(
                f"the float16 basis ended after {min(map(len, matrices))} of {steps} steps: what "
                f"was left is within its rounding, and eigenvalues closer than {blur:.3g} may "
                f"share a node; with sigma={sigma:.3g} take basis='full', or a sigma of at least "
                f"{blur:.3g}"
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
        graph="; ".join(dict.fromkeys(run.replay for run in runs)),
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
    # with (X - phi)^2 <= BAND^2 v phi, and covers where a single eigenvalue makes the peak too. An
    # eigenvalue is taken to have a thousandth of its mean weight at least, or any gap might hide
    # one (a probe gives it less in 2.5 % of the cases).
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
        for node, weight in zip(rule.nodes, rule.weights, strict=True):
            values += weight * torch.exp(-0.5 * ((grid - node) / sigma) ** 2)
    return values / (sigma * math.sqrt(2 * math.pi) * len(rules))


def _padded(x: Tensor, length: int, fill: float) -> Tensor:
    return torch.nn.functional.pad(x, (0, length - len(x)), value=fill)
