"""Hutchinson's estimator of a trace, sampled until its confidence interval is narrow enough."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Generator

import torch
from torch import Tensor

from fasthessian.arguments import ProgressCallback
from fasthessian.checkpoints.state import State
from fasthessian.checkpoints.states import States
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


def empty() -> Tensor:
    """A new tensor of no numbers, for a state."""
    return torch.empty(0, dtype=torch.float64, device="cpu")


@dataclasses.dataclass
class Sampled(State):
    """What changes while a trace is estimated, except the spread of the samples."""

    samples: Tensor = dataclasses.field(default_factory=empty)  # (s,)
    # (d,) its first elements, if it is taken instead
    diagonal: Tensor = dataclasses.field(default_factory=empty)
    squares: float = 0.0  # sum of the squares of the rows of these elements
    needed: int = 0  # products expected in all
    began: int = 0  # products of the algorithm before


def estimate(
    A: SymmetricOperator,
    states: States,
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
        states: of the algorithm.
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
    n, space = A.n, Space(A, backend)
    known = 0.0  # size of the part of the trace that the pairs give
    products_of: Callable[[Tensor, Tensor], Asking] = functools.partial(_plain, A)
    if pairs is not None:
        products_of = _deflated(A, pairs, space)
        known = float(pairs.values.abs().sum())
        if exact and len(pairs.values) == n:
            return known_trace(float(pairs.values.sum()), known, A, confidence, 0), []
    rows, products = space.rows(BLOCK), space.rows(min(BLOCK, limit))
    first = Sampled(needed=min(FIRST_CHECK, limit), began=states.made)
    state, spread = states.add("samples", first), states.add("spread", Spread())
    converged = False

    def made() -> int:
        return states.made - state.began

    def callback(total: int) -> None:
        if progress is not None:
            progress(made(), total)

    while len(state.samples) < limit and not converged:
        s = len(state.samples)
        if exact and n <= state.needed - s and (s >= FIRST_CHECK or s == 0):
            total = s + n
            value, size = yield from diagonal(
                A, state, rows, products, space, lambda: callback(total)  # noqa: B023
            )  # fmt: skip
            return known_trace(value, size, A, confidence, made()), []
        mine = s + BLOCK * A._probes.rank  # the first sample of this rank's block
        b = max(0, min(BLOCK, limit - mine))
        found = torch.zeros(BLOCK + 1, BLOCK, dtype=torch.float64, device=A.device)
        if b:
            for i in range(b):
                space.draw_(rows[i], seed, (skip + mine + i) * n, signs=True)
            yield from products_of(rows[:b], products[:b])
            C, _ = space.dots(rows[:b], products[:b])
            y = rows[:b].mul_(products[:b])
            y.sub_(y[0].clone())  # nothing is left if A is diagonal
            found[0, :b], found[1 : b + 1, :b] = C.diagonal(), space.gram(y)
        for block in A._probes.rows(found.view(-1)).cpu().view(-1, BLOCK + 1, BLOCK):
            b = min(BLOCK, limit - len(state.samples))
            if converged or not b:
                break
            state.samples = torch.cat((state.samples, block[0, :b]))
            spread.add(block[1 : b + 1, :b])
            s, value = len(state.samples), float(state.samples.mean())
            stderr, half = spread.interval(state.samples, confidence)
            wanted = rtol * abs(value) / math.sqrt(1 + rtol**2)
            converged = s >= min(FIRST_CHECK, limit) and half <= wanted
            if s >= FIRST_CHECK and not converged:
                ratio = half / wanted if wanted else math.inf
                state.needed = int(min(limit, max(s + BLOCK, s * min(ratio, 1e4) ** 2)))
        callback(s if converged else state.needed)
    return concluded(A, state, value, stderr, half, confidence, rtol, made(), known, converged)


def concluded(
    A: SymmetricOperator,
    state: Sampled,
    value: float,
    stderr: float,
    half: float,
    confidence: float,
    rtol: float,
    made: int,
    known: float,
    converged: bool,
) -> tuple[Estimate, list[Warning]]:
    """The record of a run that has ended, and where it falls short.

    ``half`` is the half-width of the interval without rounding, ``made`` the products of this rank,
    and ``known`` the size of the part of the trace that was not sampled.
    """
    matvecs, shortfalls = A._probes.total(made), list[Warning]()
    if not converged:
        shortfalls.append(
            ConvergenceWarning(
                f"the trace's interval is {value:.4g} +- {half:.2g} after {matvecs} products, "
                f"wider than rtol={rtol:g}; raise max_matvecs or rtol"
            )
        )
    half += rounding(A, abs(value) + known)
    result = Estimate(
        value=value,
        stderr=stderr,
        interval=(value - half, value + half),
        confidence=confidence,
        samples=state.samples,
        matvecs=matvecs,
        converged=converged,
    )
    return result, shortfalls


def known_trace(
    value: float, size: float, A: SymmetricOperator, confidence: float, matvecs: int
) -> Estimate:
    """A trace that is the sum of terms of total ``size``: exact to rounding of A's dtype."""
    half = rounding(A, size)
    return Estimate(
        value=value,
        stderr=0.0,
        interval=(value - half, value + half),
        confidence=confidence,
        samples=torch.tensor([value], dtype=torch.float64, device="cpu"),
        matvecs=matvecs,
        converged=True,
    )


def rounding(A: SymmetricOperator, size: float) -> float:
    """Half-width of an interval that holds the rounding of a trace of this size."""
    return NOISE * torch.finfo(A.dtype).eps * size


def diagonal(
    A: SymmetricOperator,
    state: Sampled,
    rows: Tensor,
    products: Tensor,
    space: Space,
    callback: Callable[[], None],
) -> Generator[Request, None, tuple[float, float]]:
    """The sum of the diagonal by n unit vectors, and its size ``sum |a_ii| + ||A||_F``."""
    first, end = space.slice.first, space.slice.first + space.slice.held
    for i in range(len(state.diagonal), A.n, len(products)):
        b = min(len(products), A.n - i)
        units, out = rows[:b].zero_(), products[:b]
        for j in range(max(i, first), min(i + b, end)):
            units[j - i, j - first] = 1.0
        yield Request(A, units, out)
        C, G = space.dots(units, out)
        state.diagonal = torch.cat((state.diagonal, C.diagonal().cpu()))
        state.squares += float(G.trace())
        callback()
    diagonal = state.diagonal.tolist()
    return math.fsum(diagonal), math.fsum(map(abs, diagonal)) + math.sqrt(state.squares)


def _plain(A: SymmetricOperator, V: Tensor, out: Tensor) -> Asking:
    yield Request(A, V, out)


def _deflated(
    A: SymmetricOperator, pairs: Eigenpairs, space: Space
) -> Callable[[Tensor, Tensor], Asking]:
    """Products of P A P + (sum theta / n) I, which has the trace of A; P = I - Q'Q."""
    shift, project_ = float(pairs.values.sum()) / space.n, projection(pairs, space)

    def products_of(V: Tensor, out: Tensor) -> Asking:
        rest = V.clone()
        project_(rest)
        yield Request(A, rest, out)
        project_(out)
        out.add_(V, alpha=shift)

    return products_of


def projection(pairs: Eigenpairs, space: Space) -> Callable[[Tensor], None]:
    """A function that replaces rows W (b, width) by W P, P = I - Q'Q for the eigenvectors Q.

    Raises:
        ValueError: the vectors are not orthonormal, or a value is not finite.
    """
    Q, total = space.padded(pairs.vectors), float(pairs.values.sum())
    blocks = [space.dots(Q, Q[i : i + BLOCK])[0] for i in range(0, len(Q), BLOCK)]
    if blocks:
        overlap = torch.cat(blocks, 1)
        eye = torch.eye(len(Q), dtype=overlap.dtype, device=overlap.device)
        off = float((overlap - eye).abs().max())
        if not (off < SKEW and math.isfinite(total)):
            raise InputError(
                f"deflate must hold orthonormal vectors and finite values as eigsh returns them, "
                f"but max |Q Q' - I| is {off:.2g} and the values' sum {total:.3g}"
            )

    def project_(W: Tensor) -> None:
        space.kernels.update_(Q, W, space.dots(Q, W)[0])

    return project_
