"""Independent random vectors, divided over the ranks that hold the same share of the data.

Each vector is drawn by its number, so that any number of ranks has the same ones. All ranks get the
results of all vectors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch

from fasthessian.checkpoints.states import States
from fasthessian.krylov.quadrature import Measured
from fasthessian.operators.base import SymmetricOperator
from fasthessian.operators.request import Request


def divided(
    A: SymmetricOperator,
    states: States,
    numbers: Sequence[int],
    measure: Callable[[int], Generator[Request, None, Measured]],
    before: int = 0,
) -> Generator[Request, None, tuple[list[Measured], int]]:
    """What is measured from the random vectors of these numbers, in their order.

    Args:
        A: the operator.
        states: of the algorithm, which keep what was measured.
        numbers: of the vectors.
        measure: makes the run of a vector.
        before: products of the algorithm before the first of these runs.

    Returns:
        The measurements, and how many products all of them took.
    """
    probes, own = A._probes, {}
    for number in numbers[probes.rank :: probes.size]:
        run = functools.partial(measure, number)
        own[number] = yield from states.phase(f"probe {number}", Measured.none(), run)
    made = max((measured.made for measured in own.values()), default=before) - before
    if not probes:
        return list(own.values()), made
    found: dict[str, Any] = {}
    for each in probes.objects({str(i): _packed(measured) for i, measured in own.items()}):
        found |= each
    return [_unpacked(found[str(number)]) for number in numbers], probes.total(made)


def _packed(measured: Measured) -> dict[str, Any]:
    return {**measured.numbers(), "graph": measured.graph, "jacobi": measured.jacobi.tolist()}


def _unpacked(packed: dict[str, Any]) -> Measured:
    jacobi = torch.tensor(packed["jacobi"], dtype=torch.float64, device="cpu")
    return Measured(**{**packed, "jacobi": jacobi})
