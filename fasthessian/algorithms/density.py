"""Spectral density by stochastic Lanczos quadrature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import overload

from fasthessian.arguments import ProgressCallback, integer, positive, seed_of
from fasthessian.errors import InputError, InsufficientMemoryError
from fasthessian.krylov.basis import FORMATS
from fasthessian.krylov.lanczos import Lanczos
from fasthessian.krylov.lockstep import Run, solve
from fasthessian.krylov.protocol import KrylovRun
from fasthessian.krylov.quadrature import grow
from fasthessian.krylov.smoothing import smoothed
from fasthessian.krylov.three_term import ROWS, ThreeTerm
from fasthessian.memory import available_bytes, readable
from fasthessian.operators.base import SymmetricOperator
from fasthessian.results.records import Density
from fasthessian.vectors import stride_bytes


@overload
def density(
    A: SymmetricOperator,
    *,
    steps: int = 100,
    probes: int = 1,
    sigma: float | None = None,
    seed: int = 0,
    schedule: str = "dcgs2",
    backend: str | None = None,
    basis: str = "full",
    graph: bool = True,
    progress: ProgressCallback | None = None,
) -> Density: ...


@overload
def density(
    A: Mapping[str, SymmetricOperator],
    *,
    steps: int = 100,
    probes: int = 1,
    sigma: float | None = None,
    seed: int = 0,
    schedule: str = "dcgs2",
    backend: str | None = None,
    basis: str = "full",
    graph: bool = True,
    progress: ProgressCallback | None = None,
) -> dict[str, Density]: ...


def density(
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
    progress: ProgressCallback | None = None,
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

    def begin(B: SymmetricOperator, probe: int) -> KrylovRun:
        offset = probe * B.n
        if basis == "none":
            return ThreeTerm(B, steps, seed=seed, offset=offset, backend=backend)
        try:
            return Lanczos(
                B, steps, seed=seed, offset=offset, signs=True, refill=False, schedule=schedule,
                backend=backend, basis=basis, graph=graph,
            )  # fmt: skip
        except MemoryError as error:
            needs = ROWS * stride_bytes(B.n, B.dtype)
            if needs > available_bytes(B.device):
                raise
            raise InsufficientMemoryError(
                f"{error}, or basis='none' needs {readable(needs)}"
            ) from None

    def start(B: SymmetricOperator, progress: ProgressCallback | None) -> Run[Density]:
        before, total = B.matvecs, probes * min(steps, B.n)

        def callback() -> None:
            if progress is not None:
                progress(B.matvecs - before, total)

        runs = []
        for probe in range(probes):
            krylov = begin(B, probe)
            runs.append((yield from grow(krylov, steps, callback)))
            krylov.close()
        return smoothed(runs, B.n, steps, sigma, B.matvecs - before)

    return solve(A, start, progress)
