"""Whether eigenvalues are missing from a Krylov space: copies of a multiple one, and close ones.

The Krylov space of one vector holds one eigenvector of each eigenvalue, and of two close ones a
mixture, so that converged Ritz pairs may be true and yet not be the wanted ones. A second Lanczos
run, from a random vector r orthogonal to that space V, sees the rest of A: its operator is P A P,
P = I - V V', of which every missing copy is an eigenvector, and a mixture's other half nearly one.

Let p_j be the orthonormal polynomials of r's spectral measure, which the run's three-term
recurrence gives, and x a number beyond all of its Ritz values. An eigenvalue at or beyond x has at
most the weight 1 / sum_j p_j(x)^2 in r (the Christoffel function; Akhiezer 1965, The classical
moment problem, 2.2), where a random vector has about g^2 / n, g of N(0, 1). So the run either shows
a Ritz value beyond x, and then something is missing, or soon nothing is, up to the chance that |g|
is small, which is made `MISS`.

V holds a part of the missing eigenvector where a Ritz value that stands for it has not converged
yet. Let q be the unit candidate, and c_i the couplings to it of the Ritz values theta_i that are
not wanted. On one side the run's operator is P A P + f q q', f = sum_i c_i^2 / (x - theta_i): by
the inertia of a Schur complement (Haynsworth 1968) A has as many eigenvalues beyond x besides the
wanted ones as that operator has. For two sides f has two values, and the operator is A without the
wanted pairs alone. The missing unit eigenvector then has a part of at least (1 + F)^(-1/2) outside
of V, F = sum_i c_i^2 / (x - theta_i)^2, and the weight that is looked for shrinks by 1 + F.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator

import torch
from torch import Tensor

from fasthessian.krylov.candidate import add_part_
from fasthessian.krylov.dots import dots
from fasthessian.krylov.lanczos import Lanczos
from fasthessian.krylov.three_term import ThreeTerm
from fasthessian.operators.request import Request

MISS = 1e-3  # chance that a search overlooks an eigenvalue; of two missing ones it is 1e-6
POLL_EVERY = 4  # steps between two polls of a GPU's run


class Side:
    """The orthonormal polynomials of a Jacobi matrix at one point x, which grows row by row.

    ``sign`` is 1 where x bounds the spectrum from above, -1 from below; a ``total`` of ``enough``
    says that nothing lies beyond.
    """

    def __init__(self, x: float, sign: int, enough: float = math.inf) -> None:
        self._x, self._sign, self.enough = x, sign, enough
        self._before, self._last, self._beside = 0.0, 1.0, 0.0
        self.total = 1.0  # sum of the squares
        self.passed = False  # a Ritz value lies at x or beyond

    def add(self, diagonal: float, beside: float) -> None:
        """One more row: its diagonal entry and its coupling to the next row."""
        value = self._sign * (self._x - diagonal) * self._last - self._beside * self._before
        self.passed = self.passed or value < 0  # a Sturm sequence
        self._before, self._last = self._last, value / beside if beside else math.inf
        self._beside = beside
        self.total += self._last**2 if self._last < 1e100 else math.inf


def limits(
    values: Tensor, which: str | tuple[int, int], tol: float, least: float
) -> list[tuple[float, int]]:
    """Points beyond which an eigenvalue belongs to the wanted ones, whose values (k,) these are.

    Each with the sign of its side. It lies ``tol`` of the last wanted value away, and at ``least``
    so far: an eigenvalue in between may be missing, which changes no value by more.
    """

    def beyond(value: Tensor, sign: int) -> tuple[float, int]:
        x = float(value)
        return x + sign * max(tol * abs(x), least), sign

    if which == "LM":
        last = values.abs().min()
        return [beyond(last, 1), beyond(-last, -1)]
    k = len(values)
    top, bottom = which if isinstance(which, tuple) else (k, 0) if which == "LA" else (0, k)
    ascending = values.sort().values
    ends = ([beyond(ascending[k - top], 1)] if top else []) + (
        [beyond(ascending[bottom - 1], -1)] if bottom else []
    )
    return ends


def outside(values: Tensor, points: list[tuple[float, int]]) -> int:
    """How many of the values lie beyond a point."""
    return sum(int((sign * (values - x) > 0).sum()) for x, sign in points)


def search(
    krylov: Lanczos,
    wanted: Tensor,
    points: list[tuple[float, int]],
    until: int,
    callback: Callable[[], None],
) -> Generator[Request, None, bool | None]:
    """Whether an eigenvalue beyond one of the points is missing from the rows of ``krylov``.

    Args:
        krylov: the run that is to be judged.
        wanted: (k,) indices of the Ritz values that are no further than the points.
        points: one or two, as ``limits`` gives them.
        until: products of the operator at which the search gives up.
        callback: called after each product.

    Returns:
        None if the search gave up before the answer was known.
    """
    values, S, couplings = krylov.ritz()
    rest = torch.ones(len(values), dtype=torch.bool, device="cpu").index_fill(0, wanted, False)
    coupled = rest & (couplings != 0)  # if A = 0, the points are Ritz values
    ratios = [couplings[coupled] / (x - values[coupled]) for x, _ in points]
    enough = 2 * krylov.A.n / (math.pi * MISS**2)  # P(|g| < d) <= d sqrt(2 / pi), g of N(0, 1)
    if len(points) == 1:
        shift = float((ratios[0] * couplings[coupled]).sum())

        def project_(w: Tensor) -> None:
            krylov.state.basis.project_out_(w, count=krylov.size)

        def restrict_(q: Tensor, w: Tensor) -> None:
            project_(w)
            if shift:
                add_part_(krylov.state, krylov.kernels, w, shift, q)

        side = Side(*points[0], enough)
        return (yield from _search(krylov, [side], restrict_, project_, until, callback))
    # one run for both sides, of A without the wanted pairs alone
    Q = torch.empty(len(wanted), krylov.A.n, dtype=krylov.A.dtype, device=krylov.A.device)
    krylov.state.basis.rotate(S[:, wanted], Q)

    def deflate_(w: Tensor) -> None:
        C, _ = dots(krylov.kernels, Q, w)
        krylov.kernels.update_(Q, w, C)

    sides = [
        Side(*point, enough * (1 + float(ratio.square().sum())))
        for point, ratio in zip(points, ratios, strict=True)
    ]
    return (yield from _search(krylov, sides, lambda q, w: deflate_(w), deflate_, until, callback))


def _search(
    krylov: Lanczos,
    sides: list[Side],
    restrict: Callable[[Tensor, Tensor], None],
    project: Callable[[Tensor], None],
    until: int,
    callback: Callable[[], None],
) -> Generator[Request, None, bool | None]:
    """Run ``v -> restrict(A v)`` until a side is passed, or nothing lies beyond any."""
    A, state = krylov.A, krylov.state
    if state.size >= A.n:  # no dimension is left in which something may be missing
        return False

    def prepare(start: Tensor) -> None:
        for _ in range(2):
            state.basis.project_out_(start, count=state.size)

    run = ThreeTerm(
        A, max(until - A.matvecs, 1), seed=state.seed, offset=state.next_offset(), signs=False,
        prepare=prepare, restrict=restrict, project=project, floor=krylov.noise,
        backend=krylov.kernels.NAME, deferred=krylov.deferred,
    )  # fmt: skip
    seen = 0
    while not run.ended and run.size < run.capacity and A.matvecs < until:
        yield from run.advance()
        callback()
        last = run.size == run.capacity or A.matvecs >= until
        if not run.poll(wait=last or run.size % POLL_EVERY == 0):
            continue
        for row in run.entries(seen):
            for side in sides:
                side.add(*row)
        seen = run.size
        if any(side.passed for side in sides):
            return True
        if all(side.total >= side.enough for side in sides):
            return False
    return False if run.ended or run.size == A.n else None
