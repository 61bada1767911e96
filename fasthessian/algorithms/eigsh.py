"""Extreme eigenpairs by thick-restart Lanczos."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Generator, Mapping
from types import ModuleType
from typing import Any, overload

import torch
from torch import Tensor

from fasthessian.arguments import Progress, integer, positive, seed_of
from fasthessian.errors import InputError
from fasthessian.kernels.contract import MAX_BLOCK
from fasthessian.krylov.basis import Basis
from fasthessian.krylov.dots import dots, gram
from fasthessian.krylov.found import Found
from fasthessian.krylov.lanczos import Lanczos
from fasthessian.krylov.lockstep import Run, solve
from fasthessian.krylov.missing import limits, outside, search
from fasthessian.operators.base import SymmetricOperator, operator
from fasthessian.operators.request import Request
from fasthessian.results.records import Eigenpairs

SLACK = 1e-8  # of ||A||: a missing eigenvalue so far beyond the wanted ones is looked for
LOCKED = 0.01  # of tol: what pairs converge to before their couplings are given up
LOOK = 4  # steps between two looks at a GPU's run
WHICH = ("LM", "LA", "SA", "BE")


@overload
def eigsh(A: SymmetricOperator, k: int = 1, which: str = "LM", **options: Any) -> Eigenpairs: ...


@overload
def eigsh(
    A: Mapping[str, SymmetricOperator], k: int = 1, which: str = "LM", **options: Any
) -> dict[str, Eigenpairs]: ...


def eigsh(  # type: ignore[misc]  # the overloads leave the options to this one
    A: SymmetricOperator | Mapping[str, SymmetricOperator],
    k: int = 1,
    which: str = "LM",
    *,
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    ncv: int | None = None,
    seed: int = 0,
    schedule: str = "dcgs2",
    backend: str | None = None,
    basis: str = "full",
    graph: bool = True,
    progress: Progress | None = None,
) -> Eigenpairs | dict[str, Eigenpairs]:
    r"""The k extreme eigenpairs of A, each with ``||A v - theta v|| <= tol |theta|``.

    Thick-restart Lanczos (Wu and Simon 2000) with full reorthogonalisation. By the residual
    theorem an eigenvalue of A lies within the residual of each theta. Before it says "converged", a
    second run from a random vector orthogonal to the first looks for copies of multiple eigenvalues
    and for others that the first has missed, and what it finds is added (see ``missing``). An
    eigenvalue beyond the k returned, further than tol of the last, is overlooked with a probability
    of at most 1e-3. The search takes a quarter to a half of the first run's products, more where
    eigenvalues lie close together.

    Args:
        A: the operator, size n; or operators by name such as ``A.blocks("layer")``, which advance
            together, and a dictionary of results is returned.
        k: how many pairs, 1 to n; of a dictionary, as many as an operator has at most.
        which: "LM" largest magnitude (descending), "LA" largest (descending), "SA" smallest
            (ascending), "BE" both ends (descending; the larger half, rounded up, from the top).
        tol: relative residual at which a pair is converged; never asked below the rounding of
            the operator's dtype, 16 eps ||A||.
        max_matvecs: products at most (at least 2 k on a compressed basis); default 20 times ncv,
            at least 1000. Where the Krylov space ends, which a GPU's run notices late, they may be
            exceeded until there are k rows.
        ncv: basis rows at most, k + 2 to n; default max(2 k + 30, 4 k). Memory: ncv rows of the
            basis, the k vectors and two more.
        seed: of the start vector; the same seed gives the same bits.
        schedule: orthogonalisation, "dcgs2" or "cgs2".
        backend: kernels by name; default the best that serves.
        basis: "full" rows in A's dtype; "compressed" float16 rows, half the memory of float32;
            "offload" rows in host memory, for a GPU.
        graph: on a GPU, replay a step as a CUDA graph where it can be captured.
        progress: called with (products done, None) after each.

    Returns:
        Eigenpairs: values (k,) float64, vectors (k, n) unit rows, residuals (k,) float64 from the
        recurrence plus the rounding floor 16 eps ||A||, converged, matvecs, graph (whether steps
        were "captured", or "eager: " and why). Where products are inexact - by low precision, by
        central differences, or as the asymmetry of T shows - and with a compressed basis, the pairs
        are refined by k more products (Rayleigh-Ritz on the vectors), and the residuals are the
        explicit ||A v - theta v||. With a compressed basis about 2e-4 ||A|| is their limit, and
        what lies below 1e-3 ||A|| apart from the largest is not resolved.

    Warns:
        ConvergenceWarning: max_matvecs were made and some pair has not converged or the search is
            not done, or a residual that was measured is above tol.

    Raises:
        ValueError, TypeError: an argument is out of range, or A is not symmetric.
        MemoryError: the basis does not fit; the message says what would.

    Example:
        >>> import torch, fasthessian as fh
        >>> A = fh.SymmetricOperator(lambda v: torch.arange(1.0, 101.0) * v, 100)
        >>> [round(x, 3) for x in fh.eigsh(A, 2, "LA").values.tolist()]
        [100.0, 99.0]
    """
    if which not in WHICH:
        raise InputError(f"which must be one of {', '.join(WHICH)}, got {which!r}")
    tol, seed = positive("tol", tol), seed_of(seed)
    largest = largest_of(A)
    k = integer("k", k, 1, largest)

    def start(B: SymmetricOperator, told: Progress | None) -> Run[Eigenpairs]:
        count = min(k, B.n)
        rows = default_rows(count, B.n)
        if ncv is not None:
            rows = min(integer("ncv", ncv, min(count + 2, B.n), largest), B.n)
        limit = default_limit(rows)
        if max_matvecs is not None:
            limit = integer("max_matvecs", max_matvecs, count * (1 + (basis == "compressed")))
        options: dict[str, Any] = {"schedule": schedule, "backend": backend}
        options |= {"basis": basis, "graph": graph}
        krylov = Lanczos(B, rows, seed=seed, beside=count, **options)
        return _run(krylov, count, which, tol, limit, told)

    return solve(A, start, progress)


def largest_of(A: Any) -> int:
    """Size of an operator, or of the largest of a dictionary; an empty one is refused later."""
    each = A.values() if isinstance(A, Mapping) else [A]
    return max((operator(B).n for B in each), default=sys.maxsize)


def default_rows(k: int, n: int) -> int:
    """Rows of the basis for k pairs."""
    return min(n, max(2 * k + 30, 4 * k))


def default_limit(rows: int) -> int:
    """Products at most on a basis of so many rows."""
    return max(1000, 20 * rows)


def _run(
    krylov: Lanczos, k: int, which: str, tol: float, limit: int, progress: Progress | None
) -> Run[Eigenpairs]:
    A, start = krylov.A, krylov.A.matvecs

    def told() -> None:
        if progress is not None:
            progress(A.matvecs - start, None)

    wanted = ((k + 1) // 2, k // 2) if which == "BE" else which
    found = yield from converge(krylov, k, wanted, tol, start + limit, told)
    made = A.matvecs - start
    return found.record(made), found.shortfalls(tol, made, krylov.compressed)


def converge(
    krylov: Lanczos,
    k: int,
    which: str | tuple[int, int],
    tol: float,
    until: int,
    told: Callable[[], None],
) -> Generator[Request, None, Found]:
    """Go on with a run until k pairs have converged or A has made ``until`` products; close it.

    ``which`` is one of "LM", "LA", "SA", or how many from the top and how many from the bottom,
    all in descending order.
    """
    A, ncv, compressed = krylov.A, krylov.capacity, krylov.compressed
    if compressed or not krylov.exact:  # k products are kept for the refinement
        until = until - k
    aim = tol / 2 if compressed else tol  # a margin for what the refinement measures
    entered, locking = krylov.size, False
    points: list[tuple[float, int]] = []
    count = 0  # eigenvalues beyond the points, at least
    while True:
        spent, last = A.matvecs >= until, krylov.size == ncv or krylov.exhausted
        # A breakdown may hide further copies of an eigenvalue: then only a full basis is judged.
        every = max(LOOK if krylov.deferred else 1, krylov.size // 20)
        due = krylov.size >= k + 8 and krylov.size % every == 0
        now = last or spent or krylov.size == entered
        if krylov.size >= k and (now or (due and not krylov.broke_down)):
            goal = LOCKED * aim if locking else aim
            converged, order = _judged(krylov, k, which, goal, wait=now, alike=locking)
            if not now and bool(converged.all()):  # take what was enqueued since
                converged, order = _judged(krylov, k, which, goal, wait=True, alike=locking)
            full = krylov.size == ncv or krylov.exhausted
            if full or spent or not krylov.broke_down:  # a breakdown may be noticed by this look
                if len(order) >= k and (spent or krylov.exhausted):
                    complete = krylov.exhausted
                    break
                values, done = krylov.ritz()[0], bool(converged.all())
                known = outside(values, points) >= count  # what the last search found missing
                if done and known:
                    least = max(krylov.noise, SLACK * float(values.abs().max()))
                    points = limits(values[order[:k]], which, tol, least)
                    missing = yield from search(krylov, order[:k], points, until, told)
                    if not missing:
                        complete = missing is False
                        break
                    count, locking = outside(values, points) + 1, True
                    continue
                if done and locking:
                    krylov.renew(order[:k])
                    locking = krylov.broke_down = False
                elif full:
                    krylov.restart(order[: k + (ncv - k) // 2])
                    krylov.broke_down = False
        yield from krylov.advance()
        told()

    values, S, residuals = krylov.ritz()
    chosen = order[:k]
    vectors = torch.empty(k, A.n, dtype=A.dtype, device=A.device)
    krylov.combine(S[:, chosen], vectors)
    graph, noise, exact = krylov.replay, krylov.noise, krylov.exact
    krylov.close()  # the basis, before the products of the vectors
    values, residuals = values[chosen], residuals[chosen] + krylov.dropped + noise
    if compressed or not exact:
        values, residuals = yield from _refined(A, vectors, values, krylov.kernels)
        converged = residuals <= torch.clamp(tol * values.abs(), min=2 * noise)
    return Found(values, vectors, residuals, converged, complete, graph)


def _judged(
    krylov: Lanczos,
    k: int,
    which: str | tuple[int, int],
    tol: float,
    wait: bool,
    alike: bool,
) -> tuple[Tensor, Tensor]:
    """Whether each of the k wanted pairs has converged, as of a look, and all in their order.

    With ``alike`` each pair is held to the tolerance of the least value.
    """
    none = torch.zeros(1, dtype=torch.bool, device="cpu")
    if not krylov.look(wait):
        return none, torch.arange(0, device="cpu")
    values, _, residuals = krylov.ritz()
    if len(values) < k:
        return none, torch.arange(0, device="cpu")
    order = _wanted(values, which)
    first = order[:k]
    sizes = values[first].abs()
    sizes = sizes.min().expand(k) if alike else sizes
    return residuals[first] <= torch.clamp(tol * sizes - krylov.dropped, min=krylov.noise), order


def _refined(
    A: SymmetricOperator, X: Tensor, values: Tensor, backend: ModuleType
) -> Generator[Request, None, tuple[Tensor, Tensor]]:
    """Rayleigh-Ritz on the rows of X (k, n), in place: values in the order given, residuals."""
    k = len(X)
    Y = torch.empty_like(X)
    yield Request(A, X, Y)
    products = [torch.empty(k, k, dtype=torch.float64, device=X.device) for _ in range(2)]
    for start in range(0, k, MAX_BLOCK):
        rows = slice(start, start + MAX_BLOCK)
        for product, right in zip(products, (X, Y), strict=True):
            product[:, rows], _ = dots(backend, X, right[rows])
    overlap, projection = (product.cpu() for product in products)
    # the pencil (X A X', X X') through the Cholesky factor of X X', which is I to about 1e-3
    L = torch.linalg.cholesky(overlap)
    inner = torch.linalg.solve_triangular(L, (projection + projection.T) / 2, upper=False)
    inner = torch.linalg.solve_triangular(L, inner.T, upper=False)
    found, Q = torch.linalg.eigh((inner + inner.T) / 2)
    mix = torch.linalg.solve_triangular(L.T, Q, upper=True)
    place = values.argsort().argsort()
    found, mix = found[place], mix[:, place]
    residuals = torch.empty_like(found)
    for rows_of in (X, Y):
        Basis(rows_of, 1.0, backend).rotate(mix)
    for i, (x, y) in enumerate(zip(X, Y, strict=True)):
        y.add_(x, alpha=-float(found[i]))
        residuals[i] = math.sqrt(float(gram(backend, y[None])))
    return found, residuals


def _wanted(values: Tensor, which: str | tuple[int, int]) -> Tensor:
    """Indices of the ascending ``values``, most wanted first."""
    ascending = torch.arange(len(values), device=values.device)
    if which == "SA":
        return ascending
    if which == "LA":
        return ascending.flip(0)
    if isinstance(which, str):
        return values.abs().argsort(descending=True, stable=True)
    top, bottom = which
    best = torch.cat((ascending[:bottom], ascending[len(values) - top :])).flip(0)
    rest = ascending[bottom : len(values) - top]
    turns = (rest, rest.flip(0)) if top > bottom else (rest.flip(0), rest)
    return torch.cat((best, torch.stack(turns, dim=1).reshape(-1)[: len(rest)]))
