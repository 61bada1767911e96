"""Hutchinson's estimator of a trace, sampled until its confidence interval is narrow enough."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Generator

import torch
from torch import Tensor

from fasthessian.arguments import ProgressCallback
from fasthessian.errors import ConvergenceWarning, InputError
from fasthessian.krylov.breakdown import NOISE
from fasthessian.krylov.intervals import Spread
from fasthessian.krylov.lockstep import Asking, Run
from fasthessian.krylov.space import Space
from fasthessian.operators.base import SymmetricOperator
from fasthessian.operators.request import Request
from fasthessian.results.records import Eigenpairs, Estimate

BLOCK = 8  # samples between two checks of the interval, and vectors in one pass over the data
DEFAULT_SAMPLES = 1000  # at most
FIRST_CHECK = 16  # samples: with fewer the distribution of a skewed mean is too far from normal
SKEW = 1e-2  # of max |Q Q' - I|: vectors of eigsh have 1e-6, or 1e-3 with a compressed basis


def estimate(
    A: SymmetricOperator,
    rtol: float,
    confidence: float,
    limit: int,
    seed: int,
    backend: str | None,
    progress: ProgressCallback | None,
    pairs: Eigenpairs | None = None,
    *,
    skip: int = 0,
    exact: bool = True,
) -> Run[Estimate]:
    """A run of the estimator.

    Args:
        A: the operator, size n.
        rtol: half-width of the interval over |trace| at which sampling ends.
        confidence: of the interval.
        limit: products at most.
        seed: of the stream of signs.
        backend: kernels by name.
        progress: called after each block of samples.
        pairs: eigenpairs that are deflated.
        skip: vectors of the stream that are left out.
        exact: take the diagonal instead, where that is as cheap.
    """
    n, space, start = A.n, Space(A, backend), A.matvecs
    known = 0.0  # size of the part of the trace that the pairs give
    products_of: Callable[[Tensor, Tensor], Asking] = functools.partial(_plain, A)
    if pairs is not None:
        products_of = _deflated(A, pairs, space)
        known = float(pairs.values.abs().sum())
        if exact and len(pairs.values) == n:
            return known_trace(float(pairs.values.sum()), known, A, confidence, 0), []
    rows, products = space.rows(BLOCK), space.rows(min(BLOCK, limit))
    samples, spread = torch.empty(0, dtype=torch.float64, device="cpu"), Spread()
    converged, needed = False, min(FIRST_CHECK, limit)

    def callback(total: int) -> None:
        if progress is not None:
            progress(A.matvecs - start, total)

    while len(samples) < limit and not converged:
        s = len(samples)
        if exact and n <= needed - s and (s >= FIRST_CHECK or s == 0):
            total = s + n
            value, size = yield from _diagonal(A, rows, products, space, lambda: callback(total))  # noqa: B023
            return known_trace(value, size, A, confidence, A.matvecs - start), []
        b = min(BLOCK, limit - s)
        for i in range(b):
            space.draw_(rows[i], seed, (skip + s + i) * n, signs=True)
        yield from products_of(rows[:b], products[:b])
        C, _ = space.dots(rows[:b], products[:b])
        samples = torch.cat((samples, C.diagonal().cpu()))
        y = rows[:b].mul_(products[:b])
        y.sub_(y[0].clone())  # nothing is left if A is diagonal
        spread.add(space.gram(y))
        s, value = len(samples), float(samples.mean())
        stderr, half = spread.interval(samples, confidence)
        wanted = rtol * abs(value) / math.sqrt(1 + rtol**2)
        converged = s >= min(FIRST_CHECK, limit) and half <= wanted
        if s >= FIRST_CHECK and not converged:
            ratio = half / wanted if wanted else math.inf
            needed = int(min(limit, max(s + BLOCK, s * min(ratio, 1e4) ** 2)))
        callback(s if converged else needed)
    shortfalls: list[Warning] = []
    if not converged:
        shortfalls.append(
            ConvergenceWarning(
                f"the trace's interval is {value:.4g} +- {half:.2g} after {len(samples)} products, "
                f"wider than rtol={rtol:g}; raise max_matvecs or rtol"
            )
        )
    half += _rounding(A, abs(value) + known)
    found = Estimate(
        value=value,
        stderr=stderr,
        interval=(value - half, value + half),
        confidence=confidence,
        samples=samples,
        matvecs=A.matvecs - start,
        converged=converged,
    )
    return found, shortfalls


def known_trace(
    value: float, size: float, A: SymmetricOperator, confidence: float, matvecs: int
) -> Estimate:
    """A trace that is the sum of terms of total ``size``: exact to rounding of A's dtype."""
    half = _rounding(A, size)
    return Estimate(
        value=value,
        stderr=0.0,
        interval=(value - half, value + half),
        confidence=confidence,
        samples=torch.tensor([value], dtype=torch.float64, device="cpu"),
        matvecs=matvecs,
        converged=True,
    )


def _rounding(A: SymmetricOperator, size: float) -> float:
    return NOISE * torch.finfo(A.dtype).eps * size


def _diagonal(
    A: SymmetricOperator,
    rows: Tensor,
    products: Tensor,
    space: Space,
    callback: Callable[[], None],
) -> Generator[Request, None, tuple[float, float]]:
    """The sum of the diagonal by n unit vectors, and its size ``sum |a_ii| + ||A||_F``."""
    diagonal: list[float] = []
    squares, first, end = 0.0, space.slice.first, space.slice.first + space.slice.held
    for i in range(0, A.n, len(products)):
        b = min(len(products), A.n - i)
        units, out = rows[:b].zero_(), products[:b]
        for j in range(max(i, first), min(i + b, end)):
            units[j - i, j - first] = 1.0
        yield Request(A, units, out)
        C, G = space.dots(units, out)
        diagonal += C.diagonal().tolist()
        squares += float(G.trace())
        callback()
    return math.fsum(diagonal), math.fsum(map(abs, diagonal)) + math.sqrt(squares)


def _plain(A: SymmetricOperator, V: Tensor, out: Tensor) -> Asking:
    yield Request(A, V, out)


def _deflated(
    A: SymmetricOperator, pairs: Eigenpairs, space: Space
) -> Callable[[Tensor, Tensor], Asking]:
    """Products of P A P + (sum theta / n) I, which has the trace of A; P = I - Q'Q."""
    Q, n = space.padded(pairs.vectors), space.n
    shift = float(pairs.values.sum()) / n
    blocks = [space.dots(Q, Q[i : i + BLOCK])[0] for i in range(0, len(Q), BLOCK)]
    if blocks:
        overlap = torch.cat(blocks, 1)
        eye = torch.eye(len(Q), dtype=overlap.dtype, device=overlap.device)
        off = float((overlap - eye).abs().max())
        if not (off < SKEW and math.isfinite(shift)):
            raise InputError(
                f"deflate must hold orthonormal vectors and finite values as eigsh returns them, "
                f"but max |Q Q' - I| is {off:.2g} and the values' sum {shift * n:.3g}"
            )

    def products_of(V: Tensor, out: Tensor) -> Asking:
        rest = V.clone()
        space.kernels.update_(Q, rest, space.dots(Q, rest)[0])
        yield Request(A, rest, out)
        space.kernels.update_(Q, out, space.dots(Q, out)[0])
        out.add_(V, alpha=shift)

    return products_of
