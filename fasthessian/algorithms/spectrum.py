"""Both ends of the spectrum, its density and the trace from one Krylov run."""

from __future__ import annotations

import functools
import os
from collections.abc import Generator, Mapping
from typing import Any, overload

import torch

from fasthessian.arguments import ProgressCallback, integer, positive, seed_of
from fasthessian.checkpoints.call import Call
from fasthessian.checkpoints.states import States
from fasthessian.errors import InputError
from fasthessian.krylov.hutchinson import DEFAULT_SAMPLES, FIRST_CHECK, estimate, known_trace
from fasthessian.krylov.lanczos import Lanczos
from fasthessian.krylov.lockstep import Run, solve
from fasthessian.krylov.probes import divided
from fasthessian.krylov.quadrature import Measured, grow
from fasthessian.krylov.ritz import (
    Found,
    converge,
    default_limit,
    default_rows,
    largest_size,
    refine,
)
from fasthessian.krylov.sharding import checked_sharded, sharded_operator
from fasthessian.krylov.smoothing import smoothed
from fasthessian.krylov.space import Space
from fasthessian.operators.base import SymmetricOperator
from fasthessian.operators.request import Request
from fasthessian.results.records import Spectrum

PAIRS = 5  # at each end by default


@overload
def spectrum(
    A: SymmetricOperator,
    k: int | tuple[int, int] | None = None,
    *,
    tol: float = 1e-3,
    steps: int = 100,
    probes: int = 1,
    sigma: float | None = None,
    rtol: float = 0.05,
    confidence: float = 0.95,
    max_matvecs: int | None = None,
    seed: int = 0,
    backend: str | None = None,
    basis: str = "full",
    graph: bool = True,
    sharded: bool | None = None,
    gather: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    time_limit: float | None = None,
    progress: ProgressCallback | None = None,
) -> Spectrum: ...


@overload
def spectrum(
    A: Mapping[str, SymmetricOperator],
    k: int | tuple[int, int] | None = None,
    *,
    tol: float = 1e-3,
    steps: int = 100,
    probes: int = 1,
    sigma: float | None = None,
    rtol: float = 0.05,
    confidence: float = 0.95,
    max_matvecs: int | None = None,
    seed: int = 0,
    backend: str | None = None,
    basis: str = "full",
    graph: bool = True,
    sharded: bool | None = None,
    gather: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    time_limit: float | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Spectrum]: ...


def spectrum(
    A: SymmetricOperator | Mapping[str, SymmetricOperator],
    k: int | tuple[int, int] | None = None,
    *,
    tol: float = 1e-3,
    steps: int = 100,
    probes: int = 1,
    sigma: float | None = None,
    rtol: float = 0.05,
    confidence: float = 0.95,
    max_matvecs: int | None = None,
    seed: int = 0,
    backend: str | None = None,
    basis: str = "full",
    graph: bool = True,
    sharded: bool | None = None,
    gather: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    time_limit: float | None = None,
    progress: ProgressCallback | None = None,
) -> Spectrum | dict[str, Spectrum]:
    r"""Largest and smallest eigenvalues, density and trace of A by a common run.

    One Lanczos run from random signs serves all three. Its first ``steps`` steps are those of
    `density`, to the bit. It continues as `eigsh` does until the eigenpairs of both ends have
    converged. These pairs are deflated from the trace, as in ``trace(A, deflate=...)``, which then
    needs few samples, taken with random vectors of their own. If the rows span the whole space, the
    trace is the sum of the Ritz values, without samples.

    Args:
        A: the operator, size n. Or operators by name, such as ``A.blocks("layer")``: their runs
            advance together, and a dictionary of results is returned.
        k: pairs at each end, or (largest, smallest), one of which may be 0; at most n. For a
            dictionary n is the largest size; smaller operators give all their pairs. Default 5, or
            n if that is less.
        tol: relative residual at which a pair has converged, as in `eigsh`.
        steps: of the density, at least 1, as in `density`.
        probes: random start vectors of the density; those after the first have runs of their own.
        sigma: width of the density's kernel, as in `density`.
        rtol: half-width of the trace's interval relative to |trace|, as in `trace`.
        confidence: of that interval.
        max_matvecs: maximal number of products in all; by default as many as the functions would
            take one by one. The minimum is ``steps * probes + 16``, where n replaces steps if it is
            less, and the number of pairs replaces the steps of the first probe if it is more; a
            compressed basis needs one more per pair. It may be exceeded if the Krylov space ends,
            which a run on a GPU notices late.
        seed: of all random vectors; the same seed gives the same bits.
        backend: kernels by name; default the best that serves.
        basis: "full", "compressed" or "offload" rows, as in `eigsh`. Memory, with k pairs in all:
            max(steps, 2 k + 30, 4 k) rows, k vectors and two more; 24 and k for the trace.
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
        Spectrum: top and bottom (Eigenpairs, descending and ascending, whose matvecs are those of
        their common run); trace (Estimate); density (Density); matvecs, the products of all parts.

    Warns:
        ConvergenceWarning: as in `eigsh`, `density` and `trace`, one warning per part.

    Raises:
        ValueError, TypeError: an argument is out of range, or A is not symmetric.
        MemoryError: the basis does not fit; the message says what would.

    Example:
        >>> import torch, fasthessian as fh
        >>> A = fh.SymmetricOperator(lambda v: torch.arange(1.0, 101.0) * v, 100)
        >>> s = fh.spectrum(A, 2)
        >>> [round(x, 3) for x in (*s.top.values.tolist(), *s.bottom.values.tolist())]
        [100.0, 99.0, 1.0, 2.0]
        >>> round(s.trace.value, 3)
        5050.0
    """
    call = Call.of("spectrum", locals())
    tol, seed = positive("tol", tol), seed_of(seed)
    steps, probes = integer("steps", steps, 1), integer("probes", probes, 1)
    sigma = None if sigma is None else positive("sigma", sigma)
    rtol, confidence = positive("rtol", rtol, 1), positive("confidence", confidence, 1)
    ends, split = _ends(k, largest_size(A)), checked_sharded(A, sharded)

    def start(
        B: SymmetricOperator, progress: ProgressCallback | None, states: States
    ) -> Run[Spectrum]:
        B = sharded_operator(B, split)
        top, bottom = (min(count, B.n) for count in ends)
        pairs, long = min(top + bottom, B.n), min(steps, B.n)
        rows = max(long, default_rows(pairs, B.n))
        others = long * (probes - 1) + FIRST_CHECK  # products of the further probes and the trace
        limit = default_limit(rows) + others
        if max_matvecs is not None:
            least = max(long, pairs) + others + pairs * (basis == "compressed")
            limit = integer("max_matvecs", max_matvecs, least)

        def begin(probe: int, rows: int, *, extra_vectors: int = 0, refill: bool = True) -> Lanczos:
            return Lanczos(
                B, rows, seed=seed, offset=probe * B.n, signs=True, refill=refill, backend=backend,
                basis=basis, extra_vectors=extra_vectors, graph=graph,
            )  # fmt: skip

        def callback(*_: int | None) -> None:  # without the total that the trace would pass
            if progress is not None:
                progress(states.made, None)

        def first() -> Generator[Request, None, Found]:
            krylov = begin(0, rows, extra_vectors=pairs)
            states.add("krylov", krylov.state)
            grown = functools.partial(grow, krylov, states, long, callback)
            made = (yield from states.phase("probe 0", Measured.none(), grown)).made
            both, left = (top, pairs - top), limit - others - made
            found = yield from converge(krylov, states, pairs, both, tol, left, callback)
            states.remove("krylov")
            return found

        def measure(probe: int) -> Generator[Request, None, Measured]:
            krylov = begin(probe, long, refill=False)
            states.add("krylov", krylov.state)
            measured = yield from grow(krylov, states, long, callback)
            states.remove("krylov")
            krylov.close()
            return measured

        found = yield from states.phase("pairs", Found.none(B), first)
        yield from refine(B, found, tol, Space(B, backend))

        shortfalls = found.shortfalls(tol, basis == "compressed", "steps")
        lowest = torch.arange(pairs, device="cpu").flip(0)[:bottom]  # of all that descend

        run = functools.partial(measure, 0)  # ended already
        probe_0 = yield from states.phase("probe 0", Measured.none(), run)
        rest, further = yield from divided(B, states, range(1, probes), measure, before=found.made)
        shape, warned = smoothed([probe_0, *rest], B.n, steps, sigma, probe_0.made + further)
        shortfalls += warned

        if len(found.every):
            value, size = float(found.every.sum()), float(found.every.abs().sum())
            total = known_trace(value, size, B, confidence, 0)
        else:
            samples = DEFAULT_SAMPLES
            if max_matvecs is not None:  # breakdowns may have taken more than their share
                samples = max(FIRST_CHECK, limit - found.made - further)
            total, warned = yield from estimate(
                B,
                states,
                rtol,
                confidence,
                samples,
                seed,
                backend,
                callback,
                found.record(B),
                skip=probes,
            )
            shortfalls += warned
        result = Spectrum(
            top=found.take(slice(top)).record(B, gather),
            bottom=found.take(lowest).record(B, gather),
            trace=total,
            density=shape,
            matvecs=found.made + further + total.matvecs,
        )
        return result, shortfalls

    return solve(A, start, progress, call)


def _ends(k: Any, n: int) -> tuple[int, int]:
    """How many pairs from the top and from the bottom."""
    if k is None:
        return min(PAIRS, n), min(PAIRS, n)
    if not isinstance(k, (tuple, list)):
        return integer("k", k, 1, n), int(k)
    if len(k) != 2:
        raise InputError(f"k must be a number or (largest, smallest), got {k!r}")
    top, bottom = (integer("k", count, 0, n) for count in k)
    if top + bottom == 0:
        raise InputError("k must ask for a pair at one end at least, got (0, 0)")
    return top, bottom
