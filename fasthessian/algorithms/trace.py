"""Stochastic trace with a confidence interval."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, overload

from torch import Tensor

from fasthessian.arguments import ProgressCallback, integer, positive, seed_of
from fasthessian.checkpoints.call import Call
from fasthessian.checkpoints.states import States
from fasthessian.errors import InputError, InputTypeError
from fasthessian.krylov.hutchinson import DEFAULT_SAMPLES, FIRST_CHECK, estimate
from fasthessian.krylov.lockstep import Run, solve
from fasthessian.krylov.per_batch import estimate_per_batch, fresh
from fasthessian.operators.base import SymmetricOperator, operator
from fasthessian.results.records import Eigenpairs, Estimate

METHODS = ("auto", "hutchinson")
SAMPLINGS = ("auto", "whole", "per-batch")


@overload
def trace(
    A: SymmetricOperator,
    *,
    method: str = "auto",
    sampling: str = "auto",
    rtol: float = 0.05,
    confidence: float = 0.95,
    max_matvecs: int | None = None,
    deflate: Eigenpairs | None = None,
    seed: int = 0,
    backend: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    time_limit: float | None = None,
    progress: ProgressCallback | None = None,
) -> Estimate: ...


@overload
def trace(
    A: Mapping[str, SymmetricOperator],
    *,
    method: str = "auto",
    sampling: str = "auto",
    rtol: float = 0.05,
    confidence: float = 0.95,
    max_matvecs: int | None = None,
    deflate: Mapping[str, Eigenpairs] | None = None,
    seed: int = 0,
    backend: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    time_limit: float | None = None,
    progress: ProgressCallback | None = None,
) -> dict[str, Estimate]: ...


def trace(
    A: SymmetricOperator | Mapping[str, SymmetricOperator],
    *,
    method: str = "auto",
    sampling: str = "auto",
    rtol: float = 0.05,
    confidence: float = 0.95,
    max_matvecs: int | None = None,
    deflate: Eigenpairs | Mapping[str, Eigenpairs] | None = None,
    seed: int = 0,
    backend: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    time_limit: float | None = None,
    progress: ProgressCallback | None = None,
) -> Estimate | dict[str, Estimate]:
    r"""``tr(A)``, exact by n products or as the mean of v'Av over random signs v.

    Hutchinson's estimator (1989) is unbiased. Its variance is ``2 (||A||_F^2 - sum a_ii^2)`` per
    sample. That variance is estimated from the vectors ``v * (A v)``, not from the spread of the
    samples (see ``fasthessian.krylov.intervals``), and the half-width h of the interval is the
    standard error times Student's quantile. The interval is checked after every 8 samples, from the
    16th on, and sampling ends when ``h^2 (1 + rtol^2) <= rtol^2 mean^2``. Then h is at most
    ``rtol |mean|``. The factor ``1 + rtol^2`` matters for a trace near 0: without it, one of many
    checks would accept a wrong value by chance.

    The interval covers the trace as often as ``confidence`` says, to 2 % at 95 %. This was measured
    over 500 seeds on the spectra of bench/cases/coverage.py, among them skewed ones and
    eigenvectors on few coordinates, deflated or not, at the first check and later.

    With ``deflate`` the trace is ``sum theta + tr(P A P)``, P = I - Q'Q for the eigenvectors Q, and
    only the second term is sampled (the idea of Hutch++, arXiv 2010.09649). A few outliers that
    hold most of ||A||_F then no longer add to the variance.

    With data in N batches the matrix is a weighted sum ``sum_b w_b H_b``. With
    ``sampling="per-batch"`` each batch has a vector of its own in each pass over the data, which
    adds up ``w_b v_b'H_b v_b``. This is unbiased, costs one product, and its variance is up to N
    times smaller than with one vector for all batches: 5 to 33 times on small networks with 45
    batches. The interval follows from the products of each pass alone. It is checked after every
    pass, from the 16th batch on; see ``fasthessian.krylov.per_batch``. The share of weight decay is
    exact.

    In a dictionary of blocks each block has vectors of its own, too. They share the passes, as the
    whole matrix does if it is in the dictionary: ``{"": A, **A.blocks("stage")}``. For a ResNet a
    pass for the whole and all stages takes twice the operations of a pass for the whole alone. To
    split the vectors and products of the whole matrix would cost nothing more, but the variance was
    1.05 to 14 times larger on small networks.

    "auto" takes the n diagonal elements by n products if the samples still expected are not fewer,
    and always for n <= 16. With all n eigenpairs it takes their sum, without a product. The
    interval of an exact trace is its rounding.

    Args:
        A: the operator, size n. Or operators by name, such as ``A.blocks("layer")``: their runs
            advance together, and a dictionary of results is returned.
        method: "hutchinson" takes samples; "auto" takes the exact trace where it is as cheap.
        sampling: "whole" takes the same vector for all batches, "per-batch" one for each batch, or
            microbatch. "auto" is "per-batch" for operators with 16 batches or more, without
            ``deflate`` and where the trace is not exact anyway.
        rtol: half-width of the interval relative to |trace|, in (0, 1).
        confidence: of the interval, in (0, 1).
        max_matvecs: maximal number of products, at least 2; default 1000. A pass is one product.
        deflate: eigenpairs of A as `eigsh` returns them, a dictionary for a dictionary of
            operators. Eigenpairs of `spectrum` need another seed than it had, because its start
            vectors would be samples here.
        seed: sample i is elements i n .. (i + 1) n of the seed's stream of signs; the vector of
            batch b in pass p is sample p N + b.
        backend: kernels by name; default the best that serves.
        checkpoint: a folder in which the run is saved every minute or so and can be resumed from
            after it was killed, see `resume`.
        time_limit: seconds after which the run is saved and left, see `resume`.
        progress: callback, called with (products made, products expected in all) after each block
            of 8; per batch with those of single batches of this rank, after each of them.

    Returns:
        Estimate: value; stderr; interval (low, high) at ``confidence``; samples (s,) float64, whose
        mean is the value; matvecs; converged. An exact trace has stderr 0 and one sample, itself.
        Per batch the samples are ``N w_b v_b'H_b v_b`` for each batch of each pass; their spread
        contains that of the batches, and is not the standard error.

    Warns:
        ConvergenceWarning: max_matvecs products were made and the interval is still wider.

    Raises:
        ValueError, TypeError: an argument is out of range, or ``sampling="per-batch"`` for an
            operator that has not several batches.

    Example:
        >>> import torch, fasthessian as fh
        >>> A = fh.SymmetricOperator(lambda v: torch.arange(1.0, 101.0) * v, 100)
        >>> fh.trace(A).value
        5050.0
    """
    given = dict(locals())
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if sampling not in SAMPLINGS:
        raise InputError(f"sampling must be one of {', '.join(SAMPLINGS)}, got {sampling!r}")
    rtol, confidence = positive("rtol", rtol, 1), positive("confidence", confidence, 1)
    limit = DEFAULT_SAMPLES
    if max_matvecs is not None:
        limit = integer("max_matvecs", max_matvecs, 2)
    seed = seed_of(seed)
    known = _by_operator(A, deflate)
    if known:  # as they are saved: whole vectors
        given["deflate"] = (
            {name: known[id(B)] for name, B in A.items()}
            if isinstance(A, Mapping)
            else known[id(A)]
        )
    call = Call.of("trace", given, inputs=("deflate",))

    def per_batch(B: SymmetricOperator) -> bool:
        small = method == "auto" and B.n <= FIRST_CHECK  # its trace is exact
        return fresh(B, sampling, plain=id(B) not in known and not small)

    def start(
        B: SymmetricOperator, progress: ProgressCallback | None, states: States
    ) -> Run[Estimate]:
        pairs, exact = known.get(id(B)), method == "auto"
        run = estimate_per_batch if per_batch(B) else estimate
        return run(B, states, rtol, confidence, limit, seed, backend, progress, pairs, exact=exact)

    def steps(B: SymmetricOperator) -> int:
        return B._batches().here if per_batch(B) else 1

    return solve(A, start, progress, call, steps)


def _by_operator(A: Any, pairs: Any) -> dict[int, Eigenpairs]:
    """The pairs of each operator by its id, or an error that names the argument."""
    if pairs is None:
        return {}
    single = not isinstance(A, Mapping)
    operators, given = ({"A": A}, {"A": pairs}) if single else (A, pairs)
    if not isinstance(given, Mapping) or set(given) != set(operators):
        raise InputError("deflate must be a dictionary of A's names, as eigsh returns it for A")
    known: dict[int, Eigenpairs] = {}
    for name, found in given.items():
        B = operator(operators[name])
        if not isinstance(found, Eigenpairs):
            raise InputTypeError(
                f"deflate must be Eigenpairs as eigsh returns them, got {type(found).__name__}"
            )
        Q, values = found.vectors, found.values
        if not (isinstance(Q, Tensor) and isinstance(values, Tensor) and values.dim() == 1):
            raise InputTypeError("deflate must hold tensors, values (k,) and vectors (k, n)")
        Q = B.gather(Q)
        known[id(B)] = dataclasses.replace(found, vectors=Q)
        if Q.shape != (len(values), B.n) or (Q.dtype, Q.device) != (B.dtype, B.device):
            raise InputError(
                f"deflate must hold vectors ({len(values)}, {B.n}) of {B.dtype} on {B.device}, "
                f"got {tuple(Q.shape)} of {Q.dtype} on {Q.device}"
            )
    return known
