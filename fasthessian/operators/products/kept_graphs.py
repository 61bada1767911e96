"""Graphs that are kept from product to product, until something that they depend on changes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from fasthessian.operators.kept import Kept
from fasthessian.operators.loss.protocol import Loss
from fasthessian.operators.products.engines import Graph
from fasthessian.operators.torch_state.changes import ChangeDetector
from fasthessian.operators.torch_state.lock import exclusive, process_lock
from fasthessian.operators.torch_state.module_state import Copies
from fasthessian.operators.torch_state.scopes import Scope, UndoLog, scope


class KeptGraphs(Kept):
    """The kept graphs of a loss, and the detector of changes that make them stale.

    Args:
        loss: the loss; ``follow`` surveys it anew after its data or its criterion changed.
        parameters: returns the parameters by name as they are now, checked.

    Attributes:
        capacity: how many parts keep their graph, in the order of the pass.
        graphs: those of the first parts.
        complete: every part has its graph, so that the data need not be read.
        copies: of buffers, as long as nothing changes.
        detector: compares what the loss depends on with the product before.
        surveys: how often the data or the criterion changed, so that the loss was surveyed anew.
    """

    def __init__(self, loss: Loss, parameters: Callable[[], dict[str, Tensor]]) -> None:
        self._loss, self._parameters = loss, parameters
        self.capacity = 0
        self.graphs: list[Graph] = []
        self.complete = False
        self.copies: Copies = {}
        self.detector = ChangeDetector(loss.entries)
        self.surveys = 0
        self._changes = 0, ""  # changes found so far, and what changed last
        self._runs: dict[object, int] = {}  # the threads of runs, see ``run``
        self._polling = False  # whether a poll was interrupted

    @property
    def every_part(self) -> bool:
        """Whether every part of the loss keeps its graph, once it is built."""
        return self.capacity >= self._loss.count and self._loss.fixed_order

    def follow(self, deferred: bool, whole: bool = True, data: bool = False) -> dict[str, Tensor]:
        """The parameters as they are now; stale graphs are dropped.

        See ``ChangeDetector.poll`` for the arguments.
        """
        now = self._parameters()
        data |= threading.get_ident() not in self._runs.values()
        interrupted, self._polling = self._polling, True  # what an interrupted poll found is lost
        change = self.detector.poll(deferred, whole, data)
        if change.stale or interrupted:
            self.forget()
        if change.name is not None:
            self._changes = self._changes[0] + 1, change.name
        if change.recount or interrupted or (change.stale and self._loss.terms_vary):
            self._loss.survey()
            self.surveys += 1
        self._polling = False
        return now

    def forget(self) -> None:
        """Drop all graphs, and the copies of buffers."""
        self.graphs.clear()
        self.copies.clear()
        self.complete = False

    def changes(self, poll: bool = False) -> tuple[int, str]:
        """See ``Kept``."""
        if poll:
            exclusive(self.follow)(deferred=False, data=True)
        return self._changes

    def run(self) -> Scope[None]:
        """See ``Kept``: with few parameters, comparing the data costs as much as a product."""
        return _running(self._runs)

    def rebuild(self) -> str | None:
        """See ``Kept``.

        A capture fails if a graph of the user's own holds the nodes at which gradients of the
        parameters arrive, and with them another stream.
        """
        with process_lock():
            self.forget()
            params = self._parameters()
            for p in params.values():  # a node that nobody holds is made anew each time
                _marks(p)["fasthessian"] = True
            for name, p in params.items():
                if _marks(p).pop("fasthessian", False):
                    return f"a loss or an output computed earlier is still alive and uses {name!r}"
            return None

    def held(self) -> tuple[Graph, ...]:
        """See ``Kept``."""
        return tuple(self.graphs)


@scope
def _running(undo: UndoLog, runs: dict[object, int]) -> None:
    token = object()
    undo(runs.pop, token, None)
    runs[token] = threading.get_ident()


def _marks(p: Tensor) -> dict[str, bool]:
    """Notes on the node of the graph at which the gradient of p arrives."""
    marks: Any = get_gradient_edge(p).node.metadata
    return cast("dict[str, bool]", marks)
