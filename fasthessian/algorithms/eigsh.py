"""Extreme eigenpairs by thick-restart Lanczos."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fasthessian.algorithms.arguments import (
    ConvergenceWarning,
    Progress,
    integer,
    operator,
    positive,
    seed_of,
)
from fasthessian.algorithms.lanczos import Lanczos
from fasthessian.operators.base import SymmetricOperator
from fasthessian.records import Eigenpairs

WHICH = ("LM", "LA", "SA", "BE")


def eigsh(
    A: SymmetricOperator,
    k: int = 1,
    which: str = "LM",
    *,
    tol: float = 1e-3,
    max_matvecs: int | None = None,
    ncv: int | None = None,
    seed: int = 0,
    schedule: str = "dcgs2",
    backend: str | None = None,
    progress: Progress | None = None,
) -> Eigenpairs:
    r"""The k extreme eigenpairs of A, each with ``||A v - theta v|| <= tol |theta|``.

    Thick-restart Lanczos (Wu and Simon 2000) with full reorthogonalisation. By the residual
    theorem an eigenvalue of A lies within the residual of each theta.

    Args:
        A: the operator, size n.
        k: how many pairs, 1 to n.
        which: "LM" largest magnitude (descending), "LA" largest (descending), "SA" smallest
            (ascending), "BE" both ends (descending; the larger half, rounded up, from the top).
        tol: relative residual at which a pair is converged; never asked below the rounding of
            the operator's dtype, 16 eps ||A||.
        max_matvecs: products at most; default 20 times ncv, at least 1000.
        ncv: basis rows at most, k + 2 to n (memory ncv * n words); default max(2 k + 30, 4 k).
        seed: of the start vector; the same seed gives the same bits.
        schedule: orthogonalisation, "dcgs2" or "cgs2".
        backend: kernels by name; default the best that serves.
        progress: called with (products done, None) after each.

    Returns:
        Eigenpairs: values (k,) float64, vectors (k, n) unit rows, residuals (k,) float64 from the
        recurrence plus the rounding floor 16 eps ||A||, converged, matvecs.

    Warns:
        ConvergenceWarning: max_matvecs were made and some pair has not converged.

    Raises:
        ValueError, TypeError: an argument is out of range, or A is not symmetric.

    Example:
        >>> import torch, fasthessian as fh
        >>> A = fh.SymmetricOperator(lambda v: torch.arange(1.0, 101.0) * v, 100)
        >>> [round(x, 3) for x in fh.eigsh(A, 2, "LA").values.tolist()]
        [100.0, 99.0]
    """
    n = operator(A).n
    k = integer("k", k, 1, n)
    if which not in WHICH:
        raise ValueError(f"which must be one of {', '.join(WHICH)}, got {which!r}")
    tol = positive("tol", tol)
    default_rows = min(n, max(2 * k + 30, 4 * k))
    ncv = default_rows if ncv is None else integer("ncv", ncv, min(k + 2, n), n)
    limit = max(1000, 20 * ncv) if max_matvecs is None else integer("max_matvecs", max_matvecs, k)
    seed = seed_of(seed)

    start = A.matvecs
    krylov = Lanczos(A, ncv, seed=seed, schedule=schedule, backend=backend)
    while True:
        krylov.step()
        made = A.matvecs - start
        if progress is not None:
            progress(made, None)
        full = krylov.size == ncv or krylov.exhausted
        stop = made >= limit or krylov.exhausted
        # A breakdown may hide further copies of an eigenvalue: then only a full basis is judged.
        due = krylov.size >= k + 8 and krylov.size % max(1, krylov.size // 20) == 0
        if krylov.size < k or not (full or stop or (due and not krylov.broke_down)):
            continue
        values, S, residuals = krylov.ritz()
        order = _wanted(values, which)
        floor = krylov.noise
        converged = residuals[order[:k]] <= torch.clamp(tol * values[order[:k]].abs(), min=floor)
        if stop or bool(converged.all()):
            break
        if full:
            krylov.restart(order[: k + (ncv - k) // 2])
            krylov.broke_down = False

    chosen = order[:k]
    if which == "BE":
        chosen = chosen.sort(descending=True).values
    vectors = torch.empty(k, n, dtype=A.dtype, device=A.device)
    krylov.combine(S[:, chosen], vectors)
    if not bool(converged.all()):
        warnings.warn(
            f"{int(converged.sum())} of {k} eigenpairs converged to tol={tol:g} in {made} "
            "products; raise max_matvecs or ncv, or accept the residuals returned",
            ConvergenceWarning,
            stacklevel=2,
        )
    return Eigenpairs(
        values=values[chosen],
        vectors=vectors,
        residuals=residuals[chosen] + floor,
        converged=bool(converged.all()),
        matvecs=made,
    )


def _wanted(values: Tensor, which: str) -> Tensor:
    """Indices of the ascending ``values``, most wanted first."""
    ascending = torch.arange(len(values))
    if which == "SA":
        return ascending
    if which == "LA":
        return ascending.flip(0)
    if which == "LM":
        return values.abs().argsort(descending=True, stable=True)
    both = torch.stack((ascending.flip(0), ascending), dim=1).reshape(-1)
    return both[: len(values)]
