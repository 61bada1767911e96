"""Self-checks of an operator on the user's model: they measure errors that raise no exception."""

from __future__ import annotations

import dataclasses
import math
from contextlib import closing

import torch
from torch import Tensor

from fasthessian import kernels
from fasthessian.operators.base import ASYMMETRY
from fasthessian.operators.loss.part import REPEATED, ROUNDED
from fasthessian.operators.matrix import Matrix
from fasthessian.operators.products.differences import DIFFERENCE, distances
from fasthessian.operators.products.slopes import ALLOWED, distance
from fasthessian.operators.request import Request
from fasthessian.operators.torch_state.lock import exclusive
from fasthessian.operators.torch_state.scopes import set_attribute
from fasthessian.results.record import Record


@dataclasses.dataclass(frozen=True, eq=False)
class Check(Record):
    """What ``check`` measured. Every number is relative; it is NaN if the check does not apply."""

    symmetry: float  # |u'Av - v'Au| / (|Au| + |Av|)
    repetition: float  # distance between two products with the same vector
    gradient: float  # distance between the gradient and differences of the loss
    difference: float  # distance between a product and central differences of gradients
    forward: float  # distance between a product and forward mode, if differences disagree
    weights: float  # largest change of a batch's gradient if the batch is divided
    ok: bool
    report: str

    def __str__(self) -> str:
        """One line per check: what was measured, what is accepted, what a failure means."""
        return self.report


def check(A: Matrix, exact: bool) -> Check:
    """Measure A. If ``exact``, A is the derivative of the gradient; differences must match it."""
    evaluation = A._evaluation
    u, v = (torch.empty(A.n, dtype=A.dtype, device=A.device) for _ in range(2))
    backend = kernels.select(A.device)
    backend.normal_(u, 1, 0)
    backend.normal_(v, 2, 0)
    evaluation.mask_(u)
    made = A.matvecs
    Au, Av, again = A @ u, A @ v, A @ u
    A.matvecs = made  # these products are not counted
    size = float(Au.double().norm() + Av.double().norm()) or 1.0
    uAv, vAu = (float(x.double() @ y.double()) for x, y in ((u, Av), (v, Au)))
    symmetry = abs(uAv - vAu) / size
    repetition = float((again.double() - Au.double()).norm()) / size
    rounded = evaluation.rounded()  # differences of gradients would show only rounding
    gradient = math.nan
    if not rounded:
        g = evaluation.mask_(A.gradient())
        gradient = distance(A.loss, A.loss(), g, A.theta(), evaluation.common.coarsest)
    slope, spread = _difference(A, u, Au) if exact and not rounded else (math.nan, math.nan)
    forward, allowed, kinks = math.nan, DIFFERENCE[A.dtype], ""
    if slope > allowed and spread > slope / 4:  # all steps agree if a part is detached
        forward = _forward(A, u, Au)
        if forward <= allowed:  # kinks change differences, not derivatives
            allowed, kinks = math.inf, f"  kinks: forward mode agrees to {forward:.1e}"
    weights, batch, uncut = _coupling(A)
    rows = (
        ("symmetry", symmetry, ASYMMETRY[A.dtype], "products are wrong: use another engine"),
        ("repetition", repetition, ASYMMETRY[A.dtype],
         "the loss is no function of the parameters alone: fix its random numbers"),
        ("gradient", gradient, ALLOWED.get(evaluation.common.coarsest, 1.0),
         "it is not the derivative of the loss, which detaches a part of itself (on purpose, or "
         "where the model differentiates inside: in training only? try mode='train')"),
        ("difference", slope, allowed,
         "a second derivative is wrong, or the loss detaches a part of itself; try another engine"),
        ("weights", weights, ROUNDED if rounded else REPEATED,
         f"batch {batch} is not the mean of its parts: pass weights=, or samples are coupled"),
    )  # fmt: skip
    lines, passed = [], True
    for name, value, most, meaning in rows:
        if math.isnan(value):
            why = f": {uncut}" if name == "weights" and uncut else ""
            lines.append(f"{name:<11} does not apply{why}")
            continue
        good = value <= most
        passed &= good
        accepted = kinks if most == math.inf else f" of at most {most:.0e}"
        lines.append(f"{name:<11} {value:.1e}{accepted}  " + ("ok" if good else meaning))
    if evaluation.unreached():
        lines.append(f"rows        {evaluation.unreached()}")
    report = "\n".join(lines)
    return Check(symmetry, repetition, gradient, slope, forward, weights, passed, report)


def _difference(A: Matrix, v: Tensor, Av: Tensor) -> tuple[float, float]:
    """How far A v is from differences of gradients along v; see ``distances``."""
    unit = float(A.theta().norm() or 1.0) / float(v.norm())
    return distances(lambda h: A.gradient(h * v), unit, Av)


def _coupling(A: Matrix) -> tuple[float, str, str]:
    """The largest change of a batch over the ranks, which batch it is, and why one was not cut."""
    ranks, evaluation = A._evaluation.options.ranks, A._evaluation
    found = ranks.objects(list(ranks.together(evaluation.coupling)))
    worst = max(range(len(found)), key=lambda rank: (found[rank][0] >= 0, found[rank][0]))
    change, batch, _ = found[worst]
    reasons = [reason for _, _, reason in found if reason]
    where = f"{batch} of rank {worst}" if ranks else f"{batch}"
    return change, where, reasons[0] if reasons else ""


def _forward(A: Matrix, v: Tensor, Av: Tensor) -> float:
    """The distance between A v and forward mode; NaN if forward mode fails."""
    try:
        found = _by_forward(A, v)
    except MemoryError:
        if not A._evaluation.options.ranks:
            raise
        return math.nan  # as on the other ranks
    except Exception:  # a model may raise anything under torch.func
        return math.nan
    return float((found.double() - Av.double()).norm()) / (float(Av.double().norm()) or 1.0)


def _by_forward(A: Matrix, v: Tensor) -> Tensor:
    """The product with v (n,) by the engine "forward" instead of A's engine; it is not counted."""
    evaluation = A._evaluation
    request = Request(A, v[None], torch.zeros_like(v[None]))
    forward = dataclasses.replace(evaluation.options, engine="forward")

    def made() -> None:
        with (
            set_attribute(evaluation, "options", forward),
            evaluation.conditions() as params,
            closing(evaluation.loss.parts()) as parts,
        ):
            for i, part in enumerate(parts):
                graph = A._new_graph(part, params)
                graph.products([request], first=i == 0, keep=False)

    A._shares.sum([request.out], exclusive(lambda: evaluation.within_memory(made)))
    return request.out[0].add_(v, alpha=forward.weight_decay)
