"""Ritz pairs: which are wanted, when they have converged, and thick restarts until they have."""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
from torch import Tensor

from fasthessian.checkpoints.state import State
from fasthessian.checkpoints.states import States
from fasthessian.errors import ConvergenceWarning
from fasthessian.kernels.contract import MAX_BLOCK
from fasthessian.krylov.basis import Basis
from fasthessian.krylov.lanczos import Lanczos
from fasthessian.krylov.lockstep import Asking
from fasthessian.krylov.missing import limits, outside, search
from fasthessian.krylov.space import Space
from fasthessian.operators.base import SymmetricOperator, operator
from fasthessian.operators.request import Request
from fasthessian.results.records import Eigenpairs

SLACK = 1e-8  # of ||A||: a missing eigenvalue so far beyond the wanted ones is looked for
LOCKED = 0.01  # of tol: what pairs converge to before their couplings are given up
POLL_EVERY = 4  # steps between two polls of a GPU's run


@dataclasses.dataclass
class Found(State):
    """The k wanted pairs in their order: the fields of `Eigenpairs`, and a verdict per pair."""

    SPLIT = ("vectors",)

    values: Tensor  # (k,)
    vectors: Tensor  # (k, n), or the padded slices of this rank
    residuals: Tensor  # (k,)
    converged: Tensor  # (k,) bool
    every: Tensor  # (n,) all Ritz values, if the rows span the space, else (0,)
    complete: bool = False  # no wanted eigenvalue is missing, except with the probability MISS
    graph: str = ""
    rough: bool = False  # still to be refined
    noise: float = 0.0  # the size under which a residual is rounding
    made: int = 0  # products of the algorithm up to then

    @classmethod
    def none(cls, A: SymmetricOperator) -> Found:
        """No pairs, to be restored from a checkpoint."""
        empty = torch.empty(0, dtype=torch.float64, device="cpu")
        vectors = torch.empty(0, A.slice.width, dtype=A.dtype, device=A.device)
        return cls(empty, vectors, empty, empty.bool(), empty)

    def take(self, index: Tensor | slice) -> Found:
        """The pairs at an index (j,); a slice does not copy the vectors."""
        return dataclasses.replace(
            self,
            values=self.values[index],
            vectors=self.vectors[index],
            residuals=self.residuals[index],
            converged=self.converged[index],
        )

    def record(self, A: SymmetricOperator, gather: bool = False) -> Eigenpairs:
        """The pairs as a result, with this rank's slices of the vectors or the whole ones."""
        held = self.vectors[:, : A.slice.held].contiguous()
        return Eigenpairs(
            values=self.values,
            vectors=A.gather(held) if gather else held,
            residuals=self.residuals,
            converged=self.complete and bool(self.converged.all()),
            matvecs=self.made,
            graph=self.graph,
        )

    def shortfalls(self, tol: float, compressed: bool, rows: str = "ncv") -> list[Warning]:
        """A warning if some pairs have not converged; ``rows`` is the option that adds rows."""
        if bool(self.converged.all()):
            return [] if self.complete else [ConvergenceWarning(
                f"all {len(self.values)} eigenpairs converged to tol={tol:g}, but {self.made} "
                f"products did not suffice to show that no eigenvalue between them is missing; "
                f"raise max_matvecs"
            )]  # fmt: skip
        way = f"raise max_matvecs or {rows}"
        if compressed:
            way = "raise max_matvecs or tol; residuals under 2e-4 ||A|| need basis='full'"
        return [
            ConvergenceWarning(
                f"{int(self.converged.sum())} of {len(self.values)} eigenpairs converged to "
                f"tol={tol:g} in {self.made} products; {way}, or accept the residuals returned"
            )
        ]


def largest_size(A: Any) -> int:
    """Size of an operator, or of the largest in a dictionary; an empty one is refused later."""
    each = A.values() if isinstance(A, Mapping) else [A]
    return max((operator(B).n for B in each), default=sys.maxsize)


def default_rows(k: int, n: int) -> int:
    """Rows of the basis for k pairs."""
    return min(n, max(2 * k + 30, 4 * k))


def default_limit(rows: int) -> int:
    """Products at most on a basis of so many rows."""
    return max(1000, 20 * rows)


def converge(
    krylov: Lanczos,
    states: States,
    k: int,
    which: str | tuple[int, int],
    tol: float,
    limit: int,
    callback: Callable[[], None],
) -> Generator[Request, None, Found]:
    """Continue a run until k pairs have converged and none is missing; then close it.

    All that changes is in ``krylov.state``. If a run takes over the state that another one had at a
    request, this function continues from there, to the bit. The pairs are not yet refined, see
    ``refine``.

    Args:
        krylov: the run, new or with steps made.
        states: of the algorithm, for its number of products.
        k: wanted pairs.
        which: "LM", "LA" or "SA"; or how many from the top and how many from the bottom, all in
            descending order.
        tol: relative residual at which a pair has converged.
        limit: products of the operator, from the first call on, at which the run ends in any case.
        callback: called after each product.
    """
    A, state, ncv, compressed = krylov.A, krylov.state, krylov.capacity, krylov.compressed
    loop = state.loop
    if loop.entered is None:
        loop.entered, loop.began = state.size, states.made
        loop.reserved = k if compressed or not krylov.exact else 0
    until = A.matvecs + loop.began + limit - loop.reserved - states.made
    aim = tol / 2 if compressed else tol  # a margin for what the refinement measures
    searching = state.search is not None
    if searching:  # the pairs were judged before the search
        order = wanted(krylov.ritz()[0], which)
        converged = torch.ones(k, dtype=torch.bool, device="cpu")

    while True:
        if searching:
            missing = yield from search(krylov, order[:k], loop.points, until, callback)
            state.search = None
            if not missing:
                complete = missing is False
                break
            loop.count = outside(krylov.ritz()[0], loop.points) + 1
            loop.locking, searching = True, False
        if not loop.judged:
            spent, last = A.matvecs >= until, state.size == ncv or state.exhausted
            # a breakdown may hide further copies of an eigenvalue: then only a full basis is judged
            every = max(POLL_EVERY if krylov.deferred else 1, state.size // 20)
            due = state.size >= k + (1 if krylov.warm else 8) and state.size % every == 0
            now = last or spent or state.size == loop.entered
            if state.size >= k and (now or (due and not state.broke_down)):
                alike, goal = loop.locking, LOCKED * aim if loop.locking else aim
                converged, order = _judged(krylov, k, which, goal, wait=now, alike=alike)
                if not now and bool(converged.all()):  # include what was enqueued since
                    converged, order = _judged(krylov, k, which, goal, wait=True, alike=alike)
                full = state.size == ncv or state.exhausted
                if full or spent or not state.broke_down:  # this poll may have found a breakdown
                    if len(order) >= k and (spent or state.exhausted):
                        complete = state.exhausted
                        break
                    values, done = krylov.ritz()[0], bool(converged.all())
                    # whether what the last search found missing is among them
                    searching = done and outside(values, loop.points) >= loop.count
                    if searching:
                        least = max(krylov.noise, SLACK * float(values.abs().max()))
                        loop.points = limits(values[order[:k]], which, tol, least)
                        continue
                    if done and loop.locking:
                        krylov.renew(order[:k])
                        loop.locking = state.broke_down = False
                    elif full:
                        krylov.restart(order[: k + (ncv - k) // 2])
                        state.broke_down = False
        loop.judged = True
        yield from krylov.advance()
        loop.judged = False
        callback()

    ritz, S, residuals = krylov.ritz()
    chosen = order[:k]
    vectors = torch.empty(k, A.slice.width, dtype=A.dtype, device=A.device)
    state.basis.rotate(S[:, chosen], vectors)
    # rows of float16 are orthogonal to 1e-3, so that their T does not have the trace of A
    whole = krylov.size == A.n and not compressed
    found = Found(
        values=ritz[chosen],
        vectors=vectors,
        residuals=residuals[chosen] + krylov.dropped + krylov.noise,
        converged=converged,
        every=ritz if whole else ritz[:0],
        complete=complete,
        graph=krylov.graph,
        rough=compressed or not krylov.exact,
        noise=krylov.noise,
        made=states.made,
    )
    krylov.close()
    return found


def _judged(
    krylov: Lanczos,
    k: int,
    which: str | tuple[int, int],
    tol: float,
    wait: bool,
    alike: bool,
) -> tuple[Tensor, Tensor]:
    """Whether each of the k wanted pairs has converged, as of a poll, and all in their order.

    With ``alike`` each pair is held to the tolerance of the least value.
    """
    none = torch.zeros(1, dtype=torch.bool, device="cpu")
    if not krylov.poll(wait):
        return none, torch.arange(0, device="cpu")
    values, _, residuals = krylov.ritz()
    if len(values) < k:
        return none, torch.arange(0, device="cpu")
    order = wanted(values, which)
    first = order[:k]
    sizes = values[first].abs()
    sizes = sizes.min().expand(k) if alike else sizes
    return residuals[first] <= torch.clamp(tol * sizes - krylov.dropped, min=krylov.noise), order


def wanted(values: Tensor, which: str | tuple[int, int]) -> Tensor:
    """Indices of the ascending ``values``, most wanted first; ``which`` as in ``converge``."""
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


def refine(A: SymmetricOperator, found: Found, tol: float, space: Space) -> Asking:
    """Replace pairs of inexact products or rows by those of one Rayleigh-Ritz step, in place.

    The pencil (X A X', X X'), X the vectors, is solved through the Cholesky factor of X X', which
    is I to about 1e-3. The residuals then are the explicit ones. Other pairs are left alone.
    """
    if not found.rough:
        return
    X, values = found.vectors, found.values
    k = len(X)
    Y = torch.empty_like(X)
    yield Request(A, X, Y)
    found.made += k
    products = [torch.empty(k, k, dtype=torch.float64, device=X.device) for _ in range(2)]
    for start in range(0, k, MAX_BLOCK):
        rows = slice(start, start + MAX_BLOCK)
        for product, right in zip(products, (X, Y), strict=True):
            product[:, rows], _ = space.dots(X, right[rows])
    overlap, projection = (product.cpu() for product in products)
    L = torch.linalg.cholesky(overlap)
    inner = torch.linalg.solve_triangular(L, (projection + projection.T) / 2, upper=False)
    inner = torch.linalg.solve_triangular(L, inner.T, upper=False)
    ritz, Q = torch.linalg.eigh((inner + inner.T) / 2)
    mix = torch.linalg.solve_triangular(L.T, Q, upper=True)
    place = values.argsort().argsort()
    ritz, mix = ritz[place], mix[:, place]
    residuals = torch.empty_like(ritz)
    for rows_of in (X, Y):
        Basis(rows_of, 1.0, space).rotate(mix)
    for i, (x, y) in enumerate(zip(X, Y, strict=True)):
        y.add_(x, alpha=-float(ritz[i]))
        residuals[i] = math.sqrt(float(space.gram(y[None])))
    found.values, found.residuals, found.rough = ritz, residuals, False
    found.converged = residuals <= torch.clamp(tol * ritz.abs(), min=2 * found.noise)
