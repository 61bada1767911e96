"""Stochastic trace with a confidence interval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import ModuleType
from typing import Any, overload

import torch
from torch import Tensor

from fasthessian import kernels
from fasthessian.algorithms.arguments import (
    ConvergenceWarning,
    Progress,
    integer,
    operator,
    positive,
    seed_of,
)
from fasthessian.algorithms.rounds import Request, Run, solve
from fasthessian.operators.base import SymmetricOperator
from fasthessian.records import Eigenpairs, Estimate
from fasthessian.vectors import empty_rows

METHODS = ("auto", "hutchinson")
BLOCK = 8  # samples between two looks at the interval, and vectors in one pass over the data
MOST = 1000  # samples, unless told
SKEW = 1e-2  # of max |Q Q' - I|: vectors of eigsh have 1e-6, or 1e-3 of a compressed basis
FIRST_LOOK = 16  # samples: a variance from fewer stops too early too often


@overload
def trace(A: SymmetricOperator, **options: Any) -> Estimate: ...


@overload
def trace(A: Mapping[str, SymmetricOperator], **options: Any) -> dict[str, Estimate]: ...


def trace(  # type: ignore[misc]  # the overloads leave the options to this one
    A: SymmetricOperator | Mapping[str, SymmetricOperator],
    *,
    method: str = "auto",
    rtol: float = 0.05,
    confidence: float = 0.95,
    max_matvecs: int | None = None,
    deflate: Eigenpairs | Mapping[str, Eigenpairs] | None = None,
    seed: int = 0,
    backend: str | None = None,
    progress: Progress | None = None,
) -> Estimate | dict[str, Estimate]:
    r"""``tr(A)`` as the mean of v'Av over random signs v, until the interval is narrow enough.

    Hutchinson's estimator (1989): unbiased, variance ``2 (||A||_F^2 - sum a_ii^2)`` a sample. It
    stops when the half-width of the Student-t interval is at most ``rtol |mean|``, looked at
    every 8 samples from the 16th on - never on the change of the running mean.

    With ``deflate`` the trace is ``sum theta + tr(P A P)``, P = I - Q'Q for the eigenvectors Q, and
    only the second term is sampled (the idea of Hutch++, arXiv 2010.09649): a few outliers that
    hold most of ||A||_F no longer add to the variance. The mean of a given number of samples is
    unbiased, converged pairs or not; stopping by the interval favours runs that spread little.

    Args:
        A: the operator, size n; or operators by name such as ``A.blocks("layer")``, which advance
            together, and a dictionary of results is returned.
        method: "hutchinson"; "auto" takes it.
        rtol: half-width of the interval over |trace|, in (0, 1).
        confidence: of the interval, in (0, 1).
        max_matvecs: products at most, at least 2; default 1000.
        deflate: eigenpairs of A as `eigsh` gives them, a dictionary for a dictionary of operators.
            Those of `spectrum` need another seed: its start vectors are this one's samples.
        seed: sample i is elements i n .. (i + 1) n of the seed's stream of signs.
        backend: kernels by name; default the best that serves.
        progress: called with (products done, products expected in all) after each block.

    Returns:
        Estimate: value, stderr, interval (low, high) at ``confidence``, samples (s,) float64.

    Warns:
        ConvergenceWarning: max_matvecs were made and the interval is still wider.

    Raises:
        ValueError, TypeError: an argument is out of range.

    Example:
        >>> import torch, fasthessian as fh
        >>> A = fh.SymmetricOperator(lambda v: torch.arange(1.0, 101.0) * v, 100)
        >>> fh.trace(A).value
        5050.0
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    rtol, confidence = positive("rtol", rtol, 1), positive("confidence", confidence, 1)
    limit = MOST if max_matvecs is None else integer("max_matvecs", max_matvecs, 2)
    seed = seed_of(seed)

    known = _by_operator(A, deflate)

    def start(B: SymmetricOperator, told: Progress | None) -> Run[Estimate]:
        run = hutchinson(B, rtol, confidence, limit, seed, backend, told)
        pairs = known.get(id(B))
        return run if pairs is None else deflated(run, pairs, kernels.select(B.device, backend))

    return solve(A, start, progress)


def _by_operator(A: Any, pairs: Any) -> dict[int, Eigenpairs]:
    """The pairs of each operator by its id, or an error that names the argument."""
    if pairs is None:
        return {}
    single = not isinstance(A, Mapping)
    operators, given = ({"A": A}, {"A": pairs}) if single else (A, pairs)
    if not isinstance(given, Mapping) or set(given) != set(operators):
        raise ValueError("deflate must be a dictionary of A's names, as eigsh returns it for A")
    for name, found in given.items():
        B = operator(operators[name])
        if not isinstance(found, Eigenpairs):
            raise TypeError(
                f"deflate must be Eigenpairs as eigsh returns them, got {type(found).__name__}"
            )
        Q, values = found.vectors, found.values
        if not (isinstance(Q, Tensor) and isinstance(values, Tensor) and values.dim() == 1):
            raise TypeError("deflate must hold tensors, values (k,) and vectors (k, n)")
        if Q.shape != (len(values), B.n) or (Q.dtype, Q.device) != (B.dtype, B.device):
            raise ValueError(
                f"deflate must hold vectors ({len(values)}, {B.n}) of {B.dtype} on {B.device}, "
                f"got {tuple(Q.shape)} of {Q.dtype} on {Q.device}"
            )
    return {id(operators[name]): found for name, found in given.items()}


def deflated(run: Run[Estimate], pairs: Eigenpairs, serve: ModuleType) -> Run[Estimate]:
    """Answer the requests of a run by P A P + (sum theta / n) I, which has the trace of A."""
    Q = pairs.vectors.contiguous()
    shift = float(pairs.values.sum()) / Q.shape[1]
    blocks = [serve.project_(Q, Q[i : i + BLOCK])[0] for i in range(0, len(Q), BLOCK)]
    if blocks:
        gram = torch.cat(blocks, 1)
        off = float((gram - torch.eye(len(Q), dtype=gram.dtype, device=gram.device)).abs().max())
        if not (off < SKEW and math.isfinite(shift)):
            raise ValueError(
                f"deflate must hold orthonormal vectors and finite values as eigsh returns them, "
                f"but max |Q Q' - I| is {off:.2g} and the values' sum {shift * Q.shape[1]:.3g}"
            )
    asked = next(run)
    while True:
        V, out, trusted = asked
        rest = V.clone()
        serve.update_(Q, rest, serve.project_(Q, rest)[0])
        yield Request(rest, out, trusted)
        serve.update_(Q, out, serve.project_(Q, out)[0])
        out.add_(V, alpha=shift)
        try:
            asked = next(run)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]


def hutchinson(
    A: SymmetricOperator,
    rtol: float,
    confidence: float,
    limit: int,
    seed: int,
    backend: str | None,
    progress: Progress | None,
    skip: int = 0,
) -> Run[Estimate]:
    """A run of the estimator; its first vector is the one behind ``skip`` of the stream."""
    n, serve = A.n, kernels.select(A.device, backend)
    rows = empty_rows(BLOCK, n, A.dtype, A.device)
    products = torch.empty(min(BLOCK, limit), n, dtype=A.dtype, device=A.device)
    samples = torch.empty(0, dtype=torch.float64, device="cpu")
    start, converged, needed = A.matvecs, False, min(FIRST_LOOK, limit)
    while len(samples) < limit and not converged:
        b = min(BLOCK, limit - len(samples))
        for i in range(b):
            serve.signs_(rows[i], seed, (skip + len(samples) + i) * n)
        yield Request(rows[:b], products[:b])
        C, _ = serve.project_(rows[:b], products[:b])
        samples = torch.cat((samples, C.diagonal().cpu()))
        s = len(samples)
        value, stderr = float(samples.mean()), float(samples.std()) / math.sqrt(s)
        half = student_t(confidence, s - 1) * stderr
        converged = s >= min(FIRST_LOOK, limit) and half <= rtol * abs(value)
        if s >= FIRST_LOOK and not converged:
            ratio = half / (rtol * abs(value)) if value else math.inf
            needed = int(min(limit, max(s + BLOCK, s * min(ratio, 1e4) ** 2)))
        if progress is not None:
            progress(A.matvecs - start, s if converged else needed)
    shortfalls: list[Warning] = []
    if not converged:
        shortfalls.append(
            ConvergenceWarning(
                f"the trace's interval is {value:.4g} +- {half:.2g} after {len(samples)} products, "
                f"wider than rtol={rtol:g}; raise max_matvecs or rtol"
            )
        )
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


def student_t(confidence: float, df: int) -> float:
    """Two-sided quantile of Student's t with df degrees of freedom.

    Exact for df 1 and 2, else Cornish-Fisher (Abramowitz, Stegun 26.7.5): within 0.5 % for
    df >= 3 at confidence <= 0.95, within 1e-4 for df >= 15, where samples are first looked at.
    """
    if df == 1:
        return math.tan(math.pi * confidence / 2)
    if df == 2:
        return confidence * math.sqrt(2 / (1 - confidence**2))
    z = math.sqrt(2) * float(
        torch.erfinv(torch.tensor(confidence, dtype=torch.float64, device="cpu"))
    )
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum(term / df**power for power, term in enumerate(terms))
