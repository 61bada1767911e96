"""Extreme eigenpairs by thick-restart Lanczos."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping
from typing import Any, overload

from torch import Tensor

from fasthessian.arguments import ProgressCallback, integer, positive, seed_of
from fasthessian.checkpoints.call import Call
from fasthessian.checkpoints.states import States
from fasthessian.errors import InputError
from fasthessian.krylov.lanczos import Lanczos
from fasthessian.krylov.lockstep import Run, solve
from fasthessian.krylov.ritz import (
    Found,
    converge,
    default_limit,
    default_rows,
    largest_size,
    refine,
)
from fasthessian.krylov.sharding import checked_sharded, sharded_operator
from fasthessian.krylov.space import Space
from fasthessian.operators.base import SymmetricOperator, finite, operator
from fasthessian.operators.request import Request
from fasthessian.results.records import Eigenpairs

WHICH = ("LM", "LA", "SA", "BE")


@overload
def eigsh(
    A: SymmetricOperator,
    k: int = 1,
    which: str = "LM",
    *,
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    ncv: int | None = None,
    start: Tensor | None = None,
    seed: int = 0,
    schedule: str = "dcgs2",
    backend: str | None = None,
    basis: str = "full",
    graph: bool = True,
    sharded: bool | None = None,
    gather: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    time_limit: float | None = None,
    progress: ProgressCallback | None = None,
) -> Eigenpairs: ...


@overload
def eigsh(
    A: Mapping[str, SymmetricOperator],
    k: int = 1,
    which: str = "LM",
    *,
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    ncv: int | None = None,
    start: Tensor | None = None,
    seed: int = 0,
    schedule: str = "dcgs2",
    backend: str | None = None,
    basis: str = "full",
    graph: bool = True,
    sharded: bool | None = None,
    gather: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    time_limit: float | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Eigenpairs]: ...


def eigsh(
    A: SymmetricOperator | Mapping[str, SymmetricOperator],
    k: int = 1,
    which: str = "LM",
    *,
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    ncv: int | None = None,
    start: Tensor | None = None,
    seed: int = 0,
    schedule: str = "dcgs2",
    backend: str | None = None,
    basis: str = "full",
    graph: bool = True,
    sharded: bool | None = None,
    gather: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    time_limit: float | None = None,
    progress: ProgressCallback | None = None,
) -> Eigenpairs | dict[str, Eigenpairs]:
    r"""The k extreme eigenpairs of A, each with ``||A v - theta v|| <= tol |theta|``.

    Thick-restart Lanczos (Wu and Simon 2000) with full reorthogonalisation. By the residual
    theorem A has an eigenvalue within the residual of each theta. Before the result says
    "converged", a second run from a random vector orthogonal to the first one searches for copies
    of multiple eigenvalues and for others that the first run missed; what it finds is added (see
    ``fasthessian.krylov.missing``). The probability that it overlooks an eigenvalue that belongs to
    the k wanted ones, by more than tol of the last of them, is at most 1e-3. The search takes a
    quarter to a half of the products of the first run, and more where eigenvalues are close.

    Args:
        A: the operator, size n. Or operators by name, such as ``A.blocks("layer")``: their runs
            advance together, and a dictionary of results is returned.
        k: number of pairs, 1 to n. For a dictionary n is the largest size; smaller operators give
            all their pairs.
        which: "LM" largest magnitude (descending), "LA" largest (descending), "SA" smallest
            (ascending), "BE" both ends (descending; the larger half, rounded up, from the top).
        tol: relative residual at which a pair has converged. The rounding of the operator's dtype,
            16 eps ||A||, is always accepted.
        max_matvecs: maximal number of products, at least k (2 k with a compressed basis); default
            20 times ncv, at least 1000. It may be exceeded until there are k rows if the Krylov
            space ends, which a run on a GPU notices late.
        ncv: maximal number of basis rows, k + 2 to n; default max(2 k + 30, 4 k). Memory: ncv rows
            of the basis, the k vectors and two more.
        start: (n,) or (j, n) approximate eigenvectors, such as those of a Hessian some training
            steps before; the same on all ranks, or the slices that a sharded run returned. The run
            then starts from their sum and a random vector of the same length. What it returns means
            the same. Between checkpoints of small networks it saved 3 to 10 % of the products.
        seed: of the start vector; the same seed gives the same bits.
        schedule: orthogonalisation, "dcgs2" or "cgs2".
        backend: kernels by name; default the best that serves.
        basis: "full": rows in A's dtype. "compressed": float16 rows, half the memory of float32.
            "offload": rows in host memory, for an operator on a GPU.
        graph: on a GPU, replay a step as a CUDA graph where it can be captured.
        sharded: whether rows are split over the ranks of the operator's ``group``: each rank holds
            1/P of the basis and makes 1/P of its arithmetic. None: if it pays, from n = 131,072 on.
        gather: whether a sharded run returns whole vectors on every rank; otherwise each rank has
            its columns of them (k, n_r), which ``A.gather(vectors)`` joins.
        checkpoint: a folder in which the run is saved every minute or so and can be resumed from
            after it was killed, see `resume`.
        time_limit: seconds after which the run is saved and left, see `resume`.
        progress: callback, called with (products made, None) after each product.

    Returns:
        Eigenpairs: values (k,) float64; vectors (k, n), unit rows; residuals (k,) float64, from the
        recurrence plus the rounding floor 16 eps ||A||; converged; matvecs; graph, which says
        whether steps were "captured", or "eager: " and why, and whether a breakdown ended deferred
        checks. The pairs are refined by k more products (Rayleigh-Ritz on the vectors), and the
        residuals are the explicit ||A v - theta v||, if products are inexact (by low precision, by
        central differences, or as the asymmetry of T shows) or the basis is compressed. With a
        compressed basis their limit is about 2e-4 ||A||, and eigenvalues closer than 1e-3 ||A|| are
        not resolved, except the largest ones.

    Warns:
        ConvergenceWarning: max_matvecs products were made before every pair converged or before
            the search ended; or a measured residual is above tol.

    Raises:
        ValueError, TypeError: an argument is out of range, or A is not symmetric.
        MemoryError: the basis does not fit; the message says what would.

    Example:
        >>> import torch, fasthessian as fh
        >>> A = fh.SymmetricOperator(lambda v: torch.arange(1.0, 101.0) * v, 100)
        >>> [round(x, 3) for x in fh.eigsh(A, 2, "LA").values.tolist()]
        [100.0, 99.0]
    """
    given = dict(locals())
    given["start"] = vectors = _checked_start(A, start)
    call = Call.of("eigsh", given, inputs=("start",))
    if which not in WHICH:
        raise InputError(f"which must be one of {', '.join(WHICH)}, got {which!r}")
    tol, seed = positive("tol", tol), seed_of(seed)
    largest, split = largest_size(A), checked_sharded(A, sharded)
    k = integer("k", k, 1, largest)

    def begin(
        B: SymmetricOperator, progress: ProgressCallback | None, states: States
    ) -> Run[Eigenpairs]:
        count = min(k, B.n)
        rows = default_rows(count, B.n)
        if ncv is not None:
            rows = min(integer("ncv", ncv, min(count + 2, B.n), largest), B.n)
        limit = default_limit(rows)
        if max_matvecs is not None:
            limit = integer("max_matvecs", max_matvecs, count * (1 + (basis == "compressed")))
        B = sharded_operator(B, split)
        wanted = ((count + 1) // 2, count // 2) if which == "BE" else which

        def callback() -> None:
            if progress is not None:
                progress(states.made, None)

        def pairs() -> Generator[Request, None, Found]:
            krylov = Lanczos(
                B, rows, seed=seed, schedule=schedule, backend=backend, basis=basis,
                extra_vectors=count, graph=graph, start=vectors,
            )  # fmt: skip
            states.add("krylov", krylov.state)
            found = yield from converge(krylov, states, count, wanted, tol, limit, callback)
            states.remove("krylov")
            return found

        return _run(B, states, pairs, tol, basis, backend, gather)

    return solve(A, begin, progress, call)


def _checked_start(A: Any, start: Any) -> Tensor | None:
    """The start as whole vectors (j, n)."""
    if start is None:
        return None
    if isinstance(A, Mapping):
        raise InputError(
            f"start must be None for a dictionary of operators, got {type(start).__name__}; pass "
            f"its operators one by one"
        )
    if isinstance(start, Tensor) and start.dim() in (1, 2):
        start = operator(A).gather(start.detach())
    operator(A)._check_vector("start", start, (1, 2))
    rows: Tensor = start.reshape(-1, start.shape[-1])
    if not len(rows) or not finite(rows) or not bool(rows.any(1).all()):
        raise InputError(
            "start must hold at least one vector of finite numbers, and no vector of zeros; leave "
            "it out to start from a random vector"
        )
    return rows


def _run(
    A: SymmetricOperator,
    states: States,
    pairs: Callable[[], Generator[Request, None, Found]],
    tol: float,
    basis: str,
    backend: str | None,
    gather: bool,
) -> Run[Eigenpairs]:
    found = yield from states.phase("pairs", Found.none(A), pairs)
    yield from refine(A, found, tol, Space(A, backend))
    return found.record(A, gather), found.shortfalls(tol, basis == "compressed")
