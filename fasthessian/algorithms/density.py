"""Spectral density by stochastic Lanczos quadrature."""

from __future__ import annotations

import os
from collections.abc import Generator, Mapping
from typing import overload

from fasthessian.arguments import ProgressCallback, integer, positive, seed_of
from fasthessian.checkpoints.call import Call
from fasthessian.checkpoints.states import States
from fasthessian.errors import InputError, InsufficientMemoryError
from fasthessian.krylov.basis import FORMATS
from fasthessian.krylov.lanczos import Lanczos
from fasthessian.krylov.lockstep import Run, solve
from fasthessian.krylov.probes import divided
from fasthessian.krylov.quadrature import Measured, grow
from fasthessian.krylov.sharding import checked_sharded, sharded_operator
from fasthessian.krylov.smoothing import smoothed
from fasthessian.krylov.state import ROWS
from fasthessian.krylov.three_term import ThreeTerm
from fasthessian.memory import available_bytes, readable
from fasthessian.operators.base import SymmetricOperator
from fasthessian.operators.request import Request
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
    sharded: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    time_limit: float | None = None,
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
    sharded: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    time_limit: float | None = None,
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
    sharded: bool | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    time_limit: float | None = None,
    progress: ProgressCallback | None = None,
) -> Density | dict[str, Density]:
    r"""The eigenvalue density ``phi(x) = 1/n sum_i g(x - lambda_i)``, g Gaussian of width sigma.

    Stochastic Lanczos quadrature (Golub and Welsch 1969; Lin, Saad, Yang 2016; Ghorbani, Krishnan,
    Xiao 2019): for each random start vector the Ritz values are nodes, and the squared first
    components of T's eigenvectors are weights.

    The band is pointwise, at 95 %. It is the root of the sum of squares of three parts:

    * the random choice of the probes: Wilson's interval (1927) with the variance of quadratic
      forms, ``2 tr(f(A)^2) / (n^2 probes)``, f the kernel. It holds for a single probe, too.
    * what the nodes do not resolve: a bound that is rigorous for a kernel finer than their spacing
      (see ``fasthessian.krylov.quadrature``).
    * the change from half the steps.

    The last two are 0 if the Krylov space has ended.

    Args:
        A: the operator, size n. Or operators by name, such as ``A.blocks("layer")``: their runs
            advance together, and a dictionary of results is returned.
        steps: Lanczos steps per probe, each with one product, at least 1. Memory: ``steps`` rows
            of the basis and two vectors.
        probes: random start vectors, at least 1; one is enough for n above about 1e7.
        sigma: width of the kernel, in units of the eigenvalues. Default: 0.5 % of their range, or
            the mean spacing of the nodes, weighted by the density, if that is larger (2.6 % for a
            semicircle at 50 steps). If it is much finer than the spacing, the band shows how little
            is known. If it is too fine for 2^18 grid points it is widened, with a warning.
        seed: probe p starts from elements p n .. (p + 1) n of the seed's stream of signs.
        schedule: orthogonalisation, "dcgs2" or "cgs2".
        backend: kernels by name; default the best that serves.
        basis: "full": rows in the operator's dtype. "compressed": float16 rows, half the memory of
            float32; nodes are good to about 1e-3 ||A||, with a warning if some are lost and sigma
            is finer. "offload": rows in host memory, for an operator on a GPU. "none": no basis,
            three vectors in all; the quadrature stays right, though converged nodes come back as
            copies.
        graph: on a GPU, replay a step as a CUDA graph where it can be captured.
        sharded: whether rows are split over the ranks of the operator's ``group``: each rank holds
            1/P of the basis and makes 1/P of its arithmetic. None: if it pays, from n = 131,072 on.
        checkpoint: a folder in which the run is saved every minute or so and can be resumed from
            after it was killed, see `resume`.
        time_limit: seconds after which the run is saved and left, see `resume`.
        progress: callback, called with (products made, products at most) after each product.

    Returns:
        Density: nodes and weights (probes, steps) float64, each row of weights with sum 1; values
        and their band, lower and upper, on a grid finer than the kernel; sigma; matvecs; graph,
        which says whether steps were "captured", or "eager: " and why, and whether a breakdown
        ended deferred checks. If a Krylov space ends early, the last node repeats with weight 0.

    Warns:
        ConvergenceWarning: a compressed basis lost nodes that sigma would resolve.
        UserWarning: sigma was widened.

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
    call = Call.of("density", locals())
    steps, probes = integer("steps", steps, 1), integer("probes", probes, 1)
    sigma = None if sigma is None else positive("sigma", sigma)
    seed = seed_of(seed)
    if basis not in (*FORMATS, "none"):
        raise InputError(f"basis must be one of {', '.join(FORMATS)}, none, got {basis!r}")

    def begin(B: SymmetricOperator, probe: int) -> Lanczos | ThreeTerm:
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

    split = checked_sharded(A, sharded)

    def start(
        B: SymmetricOperator, progress: ProgressCallback | None, states: States
    ) -> Run[Density]:
        B = sharded_operator(B, split)
        total = probes * min(steps, B.n)

        def callback() -> None:
            if progress is not None:
                progress(states.made, total)

        def measure(probe: int) -> Generator[Request, None, Measured]:
            krylov = begin(B, probe)
            states.add("krylov", krylov.state)
            measured = yield from grow(krylov, states, steps, callback)
            states.remove("krylov")
            krylov.close()
            return measured

        runs, made = yield from divided(B, states, range(probes), measure)
        return smoothed(runs, B.n, steps, sigma, made)

    return solve(A, start, progress, call)
