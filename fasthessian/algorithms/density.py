"""Spectral density by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from fasthessian.algorithms.arguments import (
    ConvergenceWarning,
    Progress,
    integer,
    positive,
    seed_of,
)
from fasthessian.algorithms.lanczos import Lanczos
from fasthessian.algorithms.rounds import Request, Run, solve
from fasthessian.algorithms.threeterm import ROWS, ThreeTerm
from fasthessian.basis import FORMATS
from fasthessian.memory import available_bytes, readable
from fasthessian.operators.base import SymmetricOperator
from fasthessian.records import Density
from fasthessian.vectors import stride_bytes

REACH = 8  # kernel widths beyond the outermost nodes: the mass outside is below 1e-15
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

    The band adds in quadrature 1.96 standard errors of the probes, by the theory of quadratic
    forms ``Var <= 2 tr(f(A)^2) / (n^2 probes)`` with f the kernel - so that it means something
    for one probe too - and the change from half the steps. It is pointwise.

    Args:
        A: the operator, size n; or operators by name such as ``A.blocks("layer")``, which advance
            together, and a dictionary of results is returned.
        steps: Lanczos steps and products a probe, at least 1. Memory: steps rows of the basis and
            two vectors.
        probes: random starts, at least 1; one is enough for n above about 1e7.
        sigma: width of the kernel, in units of the eigenvalues; default 0.5 % of their range. One
            too fine for 2^18 grid points is widened, with a warning.
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
        raise ValueError(f"basis must be one of {', '.join(FORMATS)}, none, got {basis!r}")

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
                raise MemoryError(f"{error}, or basis='none' needs {readable(needs)}") from None

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
    """What quadrature takes from a run: ``Lanczos.jacobi``, ``blur`` and ``replay``."""

    jacobi: Tensor
    blur: float
    replay: str


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
    return Measured(krylov.jacobi(), krylov.blur, krylov.replay)


def smoothed(
    runs: list[Measured], n: int, steps: int, sigma: float | None, matvecs: int
) -> tuple[Density, list[Warning]]:
    """The density of an operator of size n from runs of ``steps`` steps, and its shortfalls."""
    matrices, blur = [run.jacobi for run in runs], max(run.blur for run in runs)
    full = [quadrature(T) for T in matrices]
    half = [quadrature(T[: (len(T) + 1) // 2, : (len(T) + 1) // 2]) for T in matrices]

    low = min(float(nodes[0]) for nodes, _ in full)
    high = max(float(nodes[-1]) for nodes, _ in full)
    if sigma is None:
        size = max(abs(low), abs(high)) or 1.0
        sigma = max(0.005 * (high - low), 1e-4 * size)
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
    # K_sigma^2 = K_(sigma / sqrt 2) / (2 sqrt(pi) sigma), so tr(f^2) / n is a density too
    narrow = _smooth(full, grid, sigma / math.sqrt(2))
    variance = 2 * narrow / (2 * math.sqrt(math.pi) * sigma) / (n * len(runs))
    spread = torch.sqrt(BAND**2 * variance + (values - _smooth(half, grid, sigma)) ** 2)
    found = Density(
        nodes=torch.stack([_padded(nodes, steps, float(nodes[-1])) for nodes, _ in full]),
        weights=torch.stack([_padded(weights, steps, 0.0) for _, weights in full]),
        grid=grid,
        values=values,
        lower=(values - spread).clamp(min=0.0),
        upper=values + spread,
        sigma=sigma,
        matvecs=matvecs,
        graph="; ".join(dict.fromkeys(run.replay for run in runs)),
    )
    return found, shortfalls


def quadrature(T: Tensor) -> tuple[Tensor, Tensor]:
    """Gauss nodes ascending and weights of the measure that T (j, j) belongs to; sum 1."""
    nodes, S = torch.linalg.eigh(T)
    weights = S[0] ** 2
    return nodes, weights / weights.sum()


def _grid(low: float, high: float, sigma: float) -> Tensor:
    points = math.ceil((high - low + 2 * REACH * sigma) / (sigma / FINENESS)) + 1
    return torch.linspace(
        low - REACH * sigma, high + REACH * sigma, points, dtype=torch.float64, device="cpu"
    )


def _smooth(runs: list[tuple[Tensor, Tensor]], grid: Tensor, sigma: float) -> Tensor:
    """Mean over the runs of ``sum_i weight_i g(x - node_i)`` on the grid."""
    values = torch.zeros_like(grid)
    for nodes, weights in runs:
        for node, weight in zip(nodes, weights, strict=True):
            values += weight * torch.exp(-0.5 * ((grid - node) / sigma) ** 2)
    return values / (sigma * math.sqrt(2 * math.pi) * len(runs))


def _padded(x: Tensor, length: int, fill: float) -> Tensor:
    return torch.nn.functional.pad(x, (0, length - len(x)), value=fill)
