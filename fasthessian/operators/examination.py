"""The examination of a loss on the first part of its data, when an operator is built."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import warnings
from collections.abc import Sequence
from contextlib import closing

import torch
from torch import Tensor

from fasthessian import kernels
from fasthessian.errors import InputError, UnsupportedError
from fasthessian.operators.base import finite
from fasthessian.operators.evaluation import Findings
from fasthessian.operators.loss.part import REPEATED, Part
from fasthessian.operators.matrix import Matrix
from fasthessian.operators.products.differences import DIFFERENCE
from fasthessian.operators.products.engines import coarsest, examine, gradient, metered
from fasthessian.operators.products.function_guard import wrong
from fasthessian.operators.products.padding import Padding, check_untied, padding
from fasthessian.operators.products.slopes import ALLOWED, distance
from fasthessian.operators.request import Request
from fasthessian.operators.torch_state.lock import exclusive

OWN = (
    "; the model's own modules have the flags of training: in eval mode they detach a part of the "
    "loss"
)


def prepare(A: Matrix) -> str:
    """Check the loss of A, choose how many graphs are kept, and keep the first graph.

    Returns:
        The text of ``A.engine``: the choice, and what the user should know about the products.
    """
    evaluation = A._evaluation
    loss, options, kept = evaluation.loss, evaluation.options, evaluation.kept
    if options.ranks and not loss.count:
        return "this rank has no data"
    with evaluation.conditions() as params, closing(loss.parts()) as parts:
        part = next(parts)
        findings, unchecked = _first_part(A, part, params)
        needs = findings.graph_bytes * loss.size / part.size
        evaluation.findings = dataclasses.replace(findings, graph_bytes=needs)
        evaluation.common = evaluation.findings
        kept.capacity, words = options.choose(needs, loss.count, loss.fixed_order, A.device)
    if loss.note:
        words += f"; {loss.note}"
    words += compare_slope(A, part)
    if options.microbatch:
        words += _check_cut(A, options.microbatch)
    if kept.capacity and loss.fixed_order:
        with evaluation.conditions() as params:
            A._keep(A._new_graph(part, params), part, params)
    if options.precision is not None:
        words += _precision_error(A, part)
    if unchecked:
        words += _compare_product(A, part, ", ".join(unchecked))
    words += evaluation.functions.note()
    if evaluation.findings.unreached:
        words += f"; {evaluation.unreached()}"
    if evaluation.hooks.found:
        words += "; hooks on gradients do not act"
    return words


def unite(A: Matrix) -> str:
    """Let all ranks evaluate the loss and judge it in the same way; return text for ``engine``.

    Each has examined its own data. What holds for all that have data is the same for all, also for
    those without data. If one of them needs the mode "own", all take it.

    Raises:
        RuntimeError: the loss of a rank is another one in that mode.
    """
    evaluation = A._evaluation
    ranks, loss, own = evaluation.options.ranks, evaluation.loss, evaluation.findings
    if ranks.size < 2:
        return ""
    rows = [[int(number) for number in row] for row in own.padding]
    report = [evaluation.mode, str(own.coarsest).partition(".")[2], rows, list(own.unreached)]
    reports = [found for found in ranks.objects(report if loss.count else None) if found]
    if not reports:  # each rank has batches without terms, which are counted later
        return ""
    modes, dtypes, padded, unreached = zip(*reports, strict=True)
    evaluation.common = dataclasses.replace(
        own,
        coarsest=max((getattr(torch, name) for name in dtypes), key=lambda d: torch.finfo(d).eps),
        padding=tuple(Padding(*row) for row in padded[0] if all(row in each for each in padded)),
        unreached=tuple(p for p in unreached[0] if all(p in each for each in unreached)),
    )
    words = "" if evaluation.mode == "own" or "own" not in modes else OWN
    ranks.together(exclusive(lambda: _take_own_mode(A) if words else None))
    return words


def _take_own_mode(A: Matrix) -> None:
    """Set the mode "own", as another rank has; raise RuntimeError if the loss changes."""
    evaluation = A._evaluation
    if evaluation.loss.count:
        with evaluation.conditions(), closing(evaluation.loss.parts()) as parts:
            part = next(parts)
        before = _loss_and_distance(A, part)[0]
        evaluation.mode = "own"
        after = _loss_and_distance(A, part)[0]
        if not math.isclose(before, after, rel_tol=1e-6):
            raise UnsupportedError(
                f"the loss of a batch is {before:.6g} with the model in eval mode and {after:.6g} "
                f"with the flags of training, which other ranks need, as they detach a part of the "
                f"loss in eval mode; use mode='train'"
            )
        evaluation.kept.forget()
    evaluation.mode = "own"


def _first_part(A: Matrix, part: Part, params: list[Tensor]) -> tuple[Findings, list[str]]:
    """Evaluate a part twice; return the findings, and the names of unchecked nodes."""
    evaluation = A._evaluation
    with evaluation.functions.checking_more():  # before any graph is built
        first = float(evaluation.value(part).detach())
    try:
        with metered(params) as held:
            second, findings, unchecked = _graph_of(A, part, params)
            findings = dataclasses.replace(findings, graph_bytes=held())
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):
            raise
        # a model that uses torch.func inside cannot be metered
        second, findings, unchecked = _graph_of(A, part, params)
    if abs(second - first) > REPEATED * abs(first):
        raise UnsupportedError(
            f"{evaluation.loss.origin} returned {first:.6g} and then {second:.6g} at the same "
            f"parameters and random seeds; H needs a loss that is a function of the parameters"
        )
    return findings, unchecked


def _graph_of(A: Matrix, part: Part, params: list[Tensor]) -> tuple[float, Findings, list[str]]:
    """The loss of a part, the findings in its graph, and the names of unchecked nodes."""
    evaluation, options = A._evaluation, A._evaluation.options
    outputs, loss = evaluation.outputs_and_value(part)
    differentiated = A._differentiated(outputs, loss)
    unreached = examine(
        differentiated, params, evaluation.loss.freed_graph_advice, twice=options.keeps_graphs
    )
    lowest, rows = coarsest(loss), tuple(padding(loss, params))
    if not options.keeps_graphs:
        check_untied(rows, evaluation.layout.names, options.engine)
    unchecked = A._unchecked_nodes(outputs, loss)
    return float(loss.detach()), Findings(lowest, 0.0, rows, tuple(unreached)), unchecked


def compare_slope(A: Matrix, part: Part) -> str:
    """Warn if the gradient of a part is not the derivative of the loss; return text for ``engine``.

    A model that differentiates inside may let autograd record this in training mode only. Its own
    modules are then set to training mode, if that keeps the loss and makes the gradient right. If
    custom functions make the gradient, the text says so, and there is no warning.
    """
    evaluation = A._evaluation
    if evaluation.rounded():
        return ""  # differences would show only rounding
    allowed = ALLOWED[evaluation.findings.coarsest]
    off = _loss_and_distance(A, part)[1]
    if not off > allowed:
        return ""
    if evaluation.mode == "eval" and evaluation.loss.roots:
        loss = _loss_and_distance(A, part)[0]
        with contextlib.suppress(Exception):  # in training mode a model may need other inputs
            evaluation.mode = "own"
            found, rest = _loss_and_distance(A, part)
            if math.isclose(found, loss, rel_tol=1e-6) and rest <= allowed:
                return OWN
        evaluation.mode = "eval"
    if evaluation.functions.found:  # a straight-through or reversed gradient is intended
        return (
            f"; the gradient, which custom functions make, differs by {off:.0%} from differences "
            f"of the loss"
        )
    warnings.warn(
        f"the gradient differs by {off:.0%} from the derivative of {evaluation.loss.origin}, which "
        f"detaches a part of itself; {type(A).__name__} is made from that gradient: right if that "
        f"is meant, else let autograd record all of it (create_graph=True)",
        stacklevel=outside_of_package(),
    )
    return ""


def outside_of_package() -> int:
    """The ``stacklevel`` that makes a warning point to the user's line, outside of the package."""
    level, frame = 0, sys._getframe(1)
    while frame.f_globals.get("__name__", "").partition(".")[0] == "fasthessian":
        level += 1
        if frame.f_back is None:
            break
        frame = frame.f_back
    return level + 1


def _loss_and_distance(A: Matrix, part: Part) -> tuple[float, float]:
    """The loss of a part, and how far its gradient is from its differences; see ``distance``."""
    evaluation = A._evaluation
    with evaluation.conditions() as params:

        def loss(offset: Tensor) -> float:
            with evaluation.moved(params, offset):
                return float(evaluation.loss.evaluate(part)[1].detach())

        value = evaluation.value(part)
        g = evaluation.mask_(A.flatten(gradient(value, params)))
        here = float(value.detach())
        return here, distance(loss, here, g, A.theta(), evaluation.findings.coarsest)


def _check_cut(A: Matrix, microbatch: int) -> str:
    """Raise ValueError if cutting batches is wrong; return text for ``engine`` if it is unknown."""
    change, index, unknown = A._evaluation.coupling()
    if change > A._evaluation.repeated():
        raise InputError(
            f"microbatch={microbatch} changes the gradient of batch {index} "
            f"by {change:.1%}: the model or the criterion couples the samples of a batch; "
            f"use microbatch=None"
        )
    return f"; {unknown}" if unknown else ""


def name_batch(A: Matrix, requests: Sequence[Request]) -> None:
    """Raise ValueError for the first batch with a product that is not finite, if V is."""
    spare = [Request(r.operator, r.V, torch.empty_like(r.out)) for r in requests]
    if not all(finite(r.V) for r in spare):
        return
    with A._evaluation.conditions() as params, closing(A._evaluation.loss.parts()) as parts:
        for part in parts:
            A._new_graph(part, params).products(spare, first=True, keep=False)
            if not all(finite(r.out) for r in spare):
                raise InputError(f"{A} returned NaN for batch {part.position} of data")


def _compare_product(A: Matrix, part: Part, names: str) -> str:
    """Compare a product of a part with differences, because nodes with these names are unchecked.

    Returns:
        Text for ``engine`` that says why the comparison is useless; "" if the product is right.

    Raises:
        RuntimeError: the product is wrong.
    """
    if A._evaluation.rounded():  # differences would show only rounding
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


def _precision_error(A: Matrix, part: Part) -> str:
    """For ``engine``, the relative error of a product of a part with the option ``precision``."""
    v, found = _normal(A, 0), []
    for exact in (True, False):
        out = torch.zeros_like(v)
        with A._evaluation.conditions(exact=exact) as params:
            graph = A._new_graph(part, params)
            graph.products([Request(A, v, out)], first=True, keep=False)
        found.append(out.double())
    error = float((found[1] - found[0]).norm() / found[0].norm())
    return f"; {A._evaluation.options.precision}, relative error {error:.1e} of a product"


def _normal(A: Matrix, seed: int) -> Tensor:
    v = torch.empty(1, A.n, dtype=A.dtype, device=A.device)
    kernels.select(A.device).normal_(v[0], seed, 0)
    return v
