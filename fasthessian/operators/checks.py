"""Self-checks of an operator on the user's own model: what could silently be wrong, measured."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fasthessian import kernels
from fasthessian.errors import UnsupportedError
from fasthessian.operators.base import ASYMMETRY
from fasthessian.operators.loss.model_loss import REPEATED, ROUNDED, Part
from fasthessian.operators.products.function_guard import wrong
from fasthessian.operators.products.slopes import ALLOWED, distance
from fasthessian.results.record import Record

if TYPE_CHECKING:
    from fasthessian.operators.curvature import Curvature
    from fasthessian.operators.passes import Passes

# Accepted relative distance of a product from central differences of gradients: their rounding
# (some losses are float32 in every model), and activations that switch sides within the step.
DIFFERENCE = {torch.float32: 5e-2, torch.float64: 1e-3}


@dataclasses.dataclass(frozen=True, eq=False)
class Check(Record):
    """What ``check`` measured; every number is relative, NaN where it does not apply."""

    symmetry: float  # |u'Av - v'Au| over |Au| + |Av|
    repetition: float  # distance of two equal products
    gradient: float  # distance of the gradient from differences of the loss
    difference: float  # distance of a product from central differences of gradients
    forward: float  # the same from forward mode, where differences disagree
    weights: float  # largest change of a batch's gradient when it is cut
    ok: bool
    report: str

    def __str__(self) -> str:
        """One line a check: what was measured, what is accepted, what a failure means."""
        return self.report


def check(A: Curvature, exact: bool) -> Check:
    """Measure A; ``exact`` where A is the derivative of the gradient, so that differences tell."""
    u, v = (torch.empty(A.n, dtype=A.dtype, device=A.device) for _ in range(2))
    backend = kernels.select(A.device)
    backend.normal_(u, 1, 0)
    backend.normal_(v, 2, 0)
    A.mask_(u)
    made = A.matvecs
    Au, Av, again = A @ u, A @ v, A @ u
    A.matvecs = made  # for the caller none was made
    size = float(Au.double().norm() + Av.double().norm()) or 1.0
    uAv, vAu = (float(x.double() @ y.double()) for x, y in ((u, Av), (v, Au)))
    symmetry = abs(uAv - vAu) / size
    repetition = float((again.double() - Au.double()).norm()) / size
    rounded = A.rounded()  # differences of gradients would show their rounding alone
    gradient = math.nan
    if not rounded:
        g = A.mask_(A.gradient())
        gradient = distance(A.loss, A.loss(), g, A.theta(), A.coarsest)
    slope, spread = _difference(A, u, Au) if exact and not rounded else (math.nan, math.nan)
    forward, allowed, kinks = math.nan, DIFFERENCE[A.dtype], ""
    if slope > allowed and spread > slope / 4:  # what the loss detaches, every step shows alike
        forward = _forward(A, u, Au)
        if forward <= allowed:  # differences see kinks, which no derivative does
            allowed, kinks = math.inf, f"  kinks: forward mode agrees to {forward:.1e}"
    weights, batch, uncut = A.coupling()
    rows = (
        ("symmetry", symmetry, ASYMMETRY[A.dtype], "products are wrong: use another engine"),
        ("repetition", repetition, ASYMMETRY[A.dtype],
         "the loss is no function of the parameters alone: fix its random numbers"),
        ("gradient", gradient, ALLOWED.get(A.coarsest, 1.0),
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
    if A.unreached():
        lines.append(f"rows        {A.unreached()}")
    report = "\n".join(lines)
    return Check(symmetry, repetition, gradient, slope, forward, weights, passed, report)


def _difference(A: Curvature, v: Tensor, Av: Tensor) -> tuple[float, float]:
    """Distances as of ``distances`` of A v from differences of gradients along v."""
    unit = float(A.theta().norm() or 1.0) / float(v.norm())
    return distances(lambda h: A.gradient(h * v), unit, Av)


def distances(at: Callable[[float], Tensor], unit: float, want: Tensor) -> tuple[float, float]:
    """Central differences of ``at(h)`` around h = 0, in three steps.

    Args:
        at: a function of h.
        unit: how far h may go, to be scaled by the dtype.
        want: the derivative that is to be looked at.

    Returns:
        The least of their distances to ``want``, and the least between two of them; relative, to
        the size of the function over ``unit`` where ``want`` is 0.
    """
    size = float(want.double().norm()) or float(at(0.0).double().norm()) / unit or 1.0
    unit *= torch.finfo(want.dtype).eps ** (1 / 3)
    found = []
    for h in (30 * unit, unit, 0.03 * unit):  # kinks ask for small steps, rounding for large ones
        found.append((at(h).double() - at(-h).double()) / (2 * h))
    gaps = [float((slope - want.double()).norm()) for slope in found]
    apart = [float((found[i] - found[j]).norm()) for i, j in ((0, 1), (1, 2), (0, 2))]
    return min(gaps) / size, min(apart) / size


def compared(A: Passes, part: Part, names: str) -> str:
    """Compare a product of a part with differences, because of nodes of these names.

    Returns:
        For ``engine``, why that says nothing; "" if the product is right.

    Raises:
        RuntimeError: the product is wrong.
    """
    if A.rounded():  # differences would show that alone
        return f"; the second derivative of {names} is not checked in 16 bits"
    distance, spread = A._distances(part, _normal(A, 1))
    if distance <= DIFFERENCE[A.dtype]:
        return ""
    if spread <= distance / 4:
        raise UnsupportedError(wrong(names))
    return (
        f"; the second derivative of {names} could not be checked: differences disagree among "
        f"themselves, as they do at kinks"
    )


def precision_error(A: Passes, part: Part) -> str:
    """For ``engine``, how far a product of a part is from an exact one."""
    v, found = _normal(A, 0), []
    for exact in (True, False):
        out = torch.zeros_like(v)
        with A._pass(exact=exact) as params:
            task = A._task(None, v, out)
            A._made_graph(part, params).products([task], first=True, keep=False)
        found.append(out.double())
    error = float((found[1] - found[0]).norm() / found[0].norm())
    return f"; {A._options.precision}, relative error {error:.1e} of a product"


def _normal(A: Passes, seed: int) -> Tensor:
    v = torch.empty(1, A.n, dtype=A.dtype, device=A.device)
    kernels.select(A.device).normal_(v[0], seed, 0)
    return v


def _forward(A: Curvature, v: Tensor, Av: Tensor) -> float:
    """The distance of A v from forward mode; NaN where that cannot be made."""
    try:
        found = A.by_forward(v)
    except MemoryError:
        raise
    except Exception:  # whatever a model raises under torch.func
        return math.nan
    return float((found.double() - Av.double()).norm()) / (float(Av.double().norm()) or 1.0)
