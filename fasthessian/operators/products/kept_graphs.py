"""Graphs that are kept between products, until something that they depend on changes."""

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
        loss: the loss. ``follow`` surveys it again after a change of its data or its criterion.
        parameters: checks and returns the current parameters by name.

    Attributes:
        capacity: the number of parts that keep their graph, in the order of the pass.
        graphs: the graphs of the first parts.
        complete: every part has its graph, so the data need not be read.
        copies: copies of buffers; they are dropped when something changes.
        detector: compares the state that the loss depends on with that of the previous product.
        surveys: how often the loss was surveyed again, because its data or criterion changed.
    """

    def __init__(self, loss: Loss, parameters: Callable[[], dict[str, Tensor]]) -> None:
        self._loss, self._parameters = loss, parameters
        self.capacity = 0
        self.graphs: list[Graph] = []
        self.complete = False
        self.copies: Copies = {}
        self.detector = ChangeDetector(loss.entries)
        self.surveys = 0
        self._changes = 0, ""  # number of changes so far, and what changed last
        self._runs: dict[object, int] = {}  # the thread of each active run, see ``run``
        self._polling = False  # whether a poll was interrupted

    @property
    def every_part(self) -> bool:
        """Whether every part of the loss keeps its graph after the graph is built."""
        return self.capacity >= self._loss.count and self._loss.fixed_order

    def follow(self, deferred: bool, whole: bool = True, data: bool = False) -> dict[str, Tensor]:
        """Drop stale graphs, and return the current parameters.

        See ``ChangeDetector.poll`` for the arguments.
        """
        now = self._parameters()
        data |= not self.running
        interrupted, self._polling = self._polling, True  # interrupted polls lose changes
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

    @property
    def running(self) -> bool:
        """See ``Kept``."""
        return threading.get_ident() in self._runs.values()

    def run(self) -> Scope[None]:
        """See ``Kept``. With few parameters, comparing the data would cost as much as a product."""
        return _running(self._runs, self._loss)

    def rebuild(self) -> str | None:
        """See ``Kept``.

        A capture fails if a graph of the user holds the nodes that accumulate the gradients of the
        parameters, because these nodes belong to another stream.
        """
        with process_lock():
            self.forget()
            params = self._parameters()
            for p in params.values():  # a node that nobody holds is created at each access
                _metadata(p)["fasthessian"] = True
            for name, p in params.items():
                if _metadata(p).pop("fasthessian", False):
                    return f"a loss or an output computed earlier is still alive and uses {name!r}"
            return None

    def held(self) -> tuple[Graph, ...]:
        """See ``Kept``."""
        return tuple(self.graphs)


@scope
def _running(undo: UndoLog, runs: dict[object, int], loss: Loss) -> None:
    undo.enter(loss.gathered.open())  # once for all products of the run
    token = object()
    undo(runs.pop, token, None)
    runs[token] = threading.get_ident()


def _metadata(p: Tensor) -> dict[str, bool]:
    """The metadata of the node that accumulates the gradient of p."""
    metadata: Any = get_gradient_edge(p).node.metadata
    return cast("dict[str, bool]", metadata)
