"""Graphs kept from product to product, as long as what they stand for does not change."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from fasthessian.operators import parameters
from fasthessian.operators.base import SymmetricOperator
from fasthessian.operators.loss.closure_loss import ClosureLoss
from fasthessian.operators.loss.model_loss import ModelLoss
from fasthessian.operators.products.engines import Graph
from fasthessian.operators.products.function_guard import Functions
from fasthessian.operators.torch_state.changes import ChangeDetector
from fasthessian.operators.torch_state.lock import exclusive, process_lock
from fasthessian.operators.torch_state.module_state import Copies
from fasthessian.operators.torch_state.scopes import Scope, UndoLog, scope
from fasthessian.vectors import Layout


class KeptGraphs(SymmetricOperator):
    """An operator that keeps graphs of the parts of a loss."""

    layout: Layout
    _loss: ModelLoss | ClosureLoss
    _dtypes: Mapping[str, torch.dtype]
    _functions: Functions

    def _keep_none(self) -> None:
        """Begin without graphs."""
        self._capacity = 0  # parts whose graph is kept, in the order of the pass
        self._graphs: list[Graph] = []
        self._complete = False  # every part has its graph: the data need not be read
        self._copies: Copies = {}  # of buffers, as long as nothing changes
        self._watch = ChangeDetector(self._loss.entries)
        self._changes = 0, ""  # changes found so far, and what changed last
        self._runs: dict[object, int] = {}  # the threads of runs, see ``run``
        self._looking = False  # whether a look at what the loss depends on did not end

    def run(self) -> Scope[None]:
        """See ``SymmetricOperator``: for a model with few parameters the data are the product."""
        return _running(self._runs)

    def _follow(self, trusted: bool, whole: bool = True, data: bool = False) -> dict[str, Tensor]:
        """The parameters now; what is kept is dropped where it no longer stands for the loss."""
        now = parameters.followed(self.layout, self._dtypes, self._loss.named_parameters())
        data |= threading.get_ident() not in self._runs.values()
        interrupted, self._looking = self._looking, True  # then what it found is not known
        change = self._watch.poll(trusted, whole, data)
        if change.stale or interrupted:
            self._forget()
        if change.name is not None:
            self._changes = self._changes[0] + 1, change.name
        if change.recount or interrupted or (change.stale and self._loss.terms_vary):
            self._survey()
        self._looking = False
        return now

    def _survey(self) -> None:
        """Count the terms of the loss anew, after data or criterion changed."""
        self._loss.survey()

    def changes(self, look: bool = False) -> tuple[int, str]:
        """See ``SymmetricOperator``."""
        if look:
            exclusive(self._follow)(trusted=False, data=True)
        return self._changes

    def _forget(self) -> None:
        self._graphs.clear()
        self._copies.clear()
        self._complete = False

    def capturable(self) -> str | None:
        """Why a product cannot be captured in a CUDA graph; None if it can."""
        if self._capacity < self._loss.count or not self._loss.fixed_order:
            return "the graphs of some batches are built at each product"
        if self._functions.words():
            return "central differences of custom functions wait for the device"
        return None

    def rebuild(self) -> str | None:
        """Drop the kept graphs: the next product builds them on its stream.

        Returns:
            Why that will not do: a graph of the user's own holds the nodes at which gradients of
            the parameters arrive, and with them another stream. None if there is no such graph.
        """
        with process_lock():
            self._forget()
            named = self._loss.named_parameters()
            params = [named[name] for name in self.layout.names]
            for p in params:  # a node that nobody holds is made anew each time
                _marks(p)["fasthessian"] = True
            for name, p in zip(self.layout.names, params, strict=True):
                if _marks(p).pop("fasthessian", False):
                    return f"a loss or an output computed earlier is still alive and uses {name!r}"
            return None

    def kept(self) -> tuple[Graph, ...]:
        """What a captured product reads: it must live as long as the capture."""
        return tuple(self._graphs)


@scope
def _running(undo: UndoLog, runs: dict[object, int]) -> None:
    token = object()
    undo(runs.pop, token, None)
    runs[token] = threading.get_ident()


def _marks(p: Tensor) -> dict[str, bool]:
    """Notes on the node of the graph at which the gradient of p arrives."""
    marks: Any = get_gradient_edge(p).node.metadata
    return cast("dict[str, bool]", marks)
