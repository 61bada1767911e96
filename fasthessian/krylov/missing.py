"""Whether eigenvalues are missing from a Krylov space: copies of a multiple one, and close ones.

The Krylov space of one vector holds one eigenvector per eigenvalue, and a mixture of the
eigenvectors of two close eigenvalues. Ritz pairs may therefore converge and still not be the wanted
ones. A second Lanczos run, from a random vector r orthogonal to that space V, sees the rest of A:
its operator is P A P, P = I - V'V. Every missing copy is an eigenvector of it, and the other half
of a mixture is nearly one.

The three-term recurrence of that run gives p_j, the orthonormal polynomials of r's spectral
measure. Let x be a number beyond all of its Ritz values. An eigenvalue at or beyond x has at most
the weight 1 / sum_j p_j(x)^2 in r (the Christoffel function; Akhiezer 1965, The classical moment
problem, 2.2). In a random vector it has about the weight g^2 / n, g of N(0, 1). So either the run
shows a Ritz value beyond x, and an eigenvalue is missing. Or the bound soon falls below the weight,
and none is missing, except with the small probability `MISS` that |g| is small.

V holds a part of the missing eigenvector if a Ritz value that stands for it has not converged yet.
Let q be the unit candidate, and c_i the couplings to it of those Ritz values theta_i that are not
wanted. For one side the operator of the run is P A P + f q q', f = sum_i c_i^2 / (x - theta_i): by
the inertia of a Schur complement (Haynsworth 1968) it has as many eigenvalues beyond x as A has
besides the wanted ones. For two sides f would have two values; the operator then is A with only the
wanted pairs deflated. At least the part (1 + F)^(-1/2) of the missing unit eigenvector lies outside
of V, F = sum_i c_i^2 / (x - theta_i)^2, so that the weight to be looked for is divided by 1 + F.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator

import torch
from torch import Tensor

from fasthessian.krylov.candidate import add_part_
from fasthessian.krylov.lanczos import Lanczos
from fasthessian.krylov.three_term import ThreeTerm
from fasthessian.operators.request import Request

MISS = 1e-3  # probability that a search overlooks an eigenvalue; for two missing ones 1e-6
POLL_EVERY = 4  # steps between two polls of a GPU's run


class Side:
    """The orthonormal polynomials of a Jacobi matrix at one point x, which grows row by row.

    ``sign`` is 1 if x bounds the spectrum from above, -1 if from below. Once ``total`` is
    ``enough``, no eigenvalue lies beyond x.
    """

    def __init__(self, x: float, sign: int, enough: float = math.inf) -> None:
        self._x, self._sign, self.enough = x, sign, enough
        self._before, self._last, self._beta = 0.0, 1.0, 0.0
        self.total = 1.0  # sum of the squares
        self.passed = False  # a Ritz value lies at x or beyond

    def add(self, alpha: float, beta: float) -> None:
        """One more row: its diagonal entry and its coupling to the next row."""
        value = self._sign * (self._x - alpha) * self._last - self._beta * self._before
        self.passed = self.passed or value < 0  # a Sturm sequence
        self._before, self._last = self._last, value / beta if beta else math.inf
        self._beta = beta
        self.total += self._last**2 if self._last < 1e100 else math.inf


def limits(
    values: Tensor, which: str | tuple[int, int], tol: float, least: float
) -> list[tuple[float, int]]:
    """Points beyond which an eigenvalue belongs to the wanted ones, whose values (k,) these are.

    Each comes with the sign of its side. Its distance from the last wanted value is ``tol`` of
    that, but at least ``least``: an eigenvalue in between may be missing, and changes no value by
    more than that.
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

    The state of the search is that of its run, in ``krylov.state.search``: if there is one already,
    the search continues from it.

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
                add_part_(krylov.state, krylov.space, w, shift, q)

        side = Side(*points[0], enough)
        return (yield from _search(krylov, [side], restrict_, project_, until, callback))
    # one run for both sides: A with only the wanted pairs deflated
    Q = krylov.space.rows(len(wanted))
    krylov.state.basis.rotate(S[:, wanted], Q)

    def deflate_(w: Tensor) -> None:
        C, _ = krylov.space.dots(Q, w)
        krylov.space.kernels.update_(Q, w, C)

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
    """Run ``v -> restrict(A v)`` until a side is passed, or no eigenvalue lies beyond any."""
    A, state = krylov.A, krylov.state
    if state.size >= A.n:  # no dimension is left in which something may be missing
        return False

    def prepare(start: Tensor) -> None:
        for _ in range(2):
            state.basis.project_out_(start, count=state.size)

    run = ThreeTerm(
        A, max(until - A.matvecs, 1), seed=state.seed,
        offset=0 if state.search else state.next_offset(), signs=False, prepare=prepare,
        restrict=restrict, project=project, floor=krylov.noise, backend=krylov.space.kernels.NAME,
        deferred=krylov.deferred, state=state.search,
    )  # fmt: skip
    state.search, seen = run.state, 0
    while True:
        last = run.ended or run.size == run.capacity or A.matvecs >= until
        if run.size and run.poll(wait=last or run.size % POLL_EVERY == 0):
            for row in run.entries(seen):
                for side in sides:
                    side.add(*row)
            seen = run.size
            if any(side.passed for side in sides):
                return True
            if all(side.total >= side.enough for side in sides):
                return False
        if last or run.ended:
            return False if run.ended or run.size == A.n else None
        yield from run.advance()
        callback()
