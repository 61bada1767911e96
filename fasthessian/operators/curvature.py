"""What the curvature matrices of a loss share: data, parameters, kept graphs, the pass."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from fasthessian.memory import available_bytes, readable
from fasthessian.operators import parameters
from fasthessian.operators.base import SymmetricOperator
from fasthessian.operators.engines import (
    ENGINES,
    Graph,
    examine,
    gradient_into,
    metered,
)
from fasthessian.operators.losses import ClosureLoss, ModelLoss, Part
from fasthessian.operators.rewrite import Rewrite
from fasthessian.operators.state import Copies, Snapshot, engaged
from fasthessian.vectors import Layout

REPEATED = 1e-3  # relative; two evaluations of one loss differ by rounding only


class Curvature(SymmetricOperator):
    """A curvature matrix of a loss over data, by products with the graph of each part.

    A subclass makes the graphs (``_graph``); see ``Hessian`` for the arguments.

    Attributes:
        n, dtype, device, matvecs: as of ``SymmetricOperator``.
        layout: names, shapes and places of the parameters in a flat vector.
        engine: how products are made, and why.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., Any] | None,
        data: Any,
        *,
        params: Iterable[str] | Iterable[Tensor] | None = None,
        engine: str = "auto",
        precision: None = None,
        weights: str | Sequence[float] | Callable[[Any], float] = "auto",
        group: None = None,
        mode: str = "eval",
        memory_budget: int | None = None,
    ) -> None:
        for name, value in (("precision", precision), ("group", group)):
            if value is not None:
                raise ValueError(f"{name} must be None, got {value!r}")
        if mode not in ("eval", "train"):
            raise ValueError(f"mode must be 'eval' or 'train', got {mode!r}")
        chosen = parameters.of_model(model, params)
        like = next(iter(chosen.values()))
        loss = ModelLoss(model, criterion, data, weights, mode, like)
        self._prepare(loss, chosen, engine, mode, memory_budget)

    def _graph(self, part: Part, params: list[Tensor]) -> Graph:
        """The differentiable graph of one part."""
        raise NotImplementedError

    def _prepare(
        self,
        loss: ModelLoss | ClosureLoss,
        chosen: dict[str, Tensor],
        engine: str,
        mode: str,
        memory_budget: int | None,
    ) -> None:
        if engine not in ENGINES:
            raise ValueError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
        if memory_budget is not None and not (
            isinstance(memory_budget, (int, float)) and memory_budget >= 0
        ):
            raise ValueError(
                f"memory_budget must be None or a number of bytes >= 0, got {memory_budget!r}"
            )
        self.layout = Layout(chosen)
        self._describe(self.layout.n, self.layout.dtype, self.layout.device)
        self._loss, self._mode = loss, mode
        self._capacity = 0  # parts whose graph is kept, in the order of the pass
        self._graphs: list[Graph] = []
        self._complete = False  # every part has its graph: the data need not be read
        self._snapshot: Snapshot | None = None
        self._copies: Copies = {}  # of buffers, as long as the snapshot holds
        with self._pass() as params, closing(loss.parts()) as parts:
            part = next(parts)
            self._choose(engine, memory_budget, self._try(part, params), part)
        if self._capacity and loss.replayable:
            with self._pass() as params:
                self._graphs.append(self._graph(part, params))

    def _try(self, part: Part, params: list[Tensor]) -> int:
        """Check the loss of the first part; return the bytes that its graph holds."""
        with metered(params) as held:
            loss = self._value(part)
            examine(loss, params)
            measured = held()
        first = float(loss.detach())
        del loss
        second = float(self._value(part).detach())
        if abs(second - first) > REPEATED * abs(first):
            raise RuntimeError(
                f"{self._loss.origin} returned {first:.6g} and then {second:.6g} at the same "
                f"parameters and random seeds; H needs a loss that is a function of the parameters"
            )
        return measured

    def _choose(self, engine: str, budget: int | None, measured: int, part: Part) -> None:
        """How many parts keep their graph, and the words that say why."""
        count = self._loss.count
        whole = measured * self._loss.size / part.size
        size = f"{readable(whole)} of graphs for {count} part{'s' if count > 1 else ''}"
        if engine != "auto":
            self._capacity = sys.maxsize if engine == "retained" else 0
            self.engine = f"{engine}: as asked, {size}"
            return
        if budget is None:
            budget = available_bytes(self.device) // 2
        limit = f"the budget of {readable(budget)}"
        if whole <= budget:
            self._capacity = sys.maxsize
            self.engine = f"retained: {size}, within {limit}"
            return
        # a loader may shuffle: then no kept graph stands for a part of the next pass
        self._capacity = int(budget / whole * count) if self._loss.replayable else 0
        if self._capacity:
            self.engine = f"retained for {self._capacity} parts: {size}, above {limit}"
        else:
            self.engine = f"recompute: {size}, above {limit}"

    @contextlib.contextmanager
    def _pass(self, curved: bool = True, trusted: bool = False) -> Iterator[list[Tensor]]:
        """The parameters as they are now, inside the conditions of a product.

        A pass that is not ``curved`` needs the loss alone. The rewrite spans the derivatives too,
        because checkpointed layers are run again there.
        """
        now = parameters.followed(self.layout, self._loss.named())
        if not trusted and self._loss.changed():  # class weights are read
            self._forget()
            self._loss.survey()
        if self._snapshot is not None and not self._snapshot.matches(self._loss.watched(), trusted):
            self._forget()
        if self._snapshot is None and self._capacity:
            self._snapshot = Snapshot(self._loss.watched())
        copies = self._copies if self._capacity else None
        rewrite = Rewrite() if curved else contextlib.nullcontext()
        with engaged(self._loss.roots, self._mode, self.device, copies), rewrite:
            yield list(now.values())

    def _forget(self) -> None:
        self._graphs.clear()
        self._copies.clear()
        self._complete, self._snapshot = False, None

    def _value(self, part: Part) -> Tensor:
        """The loss of a part, checked to be finite."""
        return self._evaluated(part)[1]

    def _evaluated(self, part: Part) -> tuple[Any, Tensor]:
        """The outputs and the loss of a part, checked to be finite."""
        outputs, loss = self._loss.evaluate(part)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ValueError(
                f"the loss is {value} (batch {part.position} of data); "
                f"check the parameters, the inputs and the targets"
            )
        return outputs, loss

    def capturable(self) -> str | None:
        """Why a product cannot be captured in a CUDA graph; None if it can."""
        if self._capacity < self._loss.count or not self._loss.replayable:
            return "the graphs of some batches are built at each product"
        return None

    def rebuild(self) -> str | None:
        """Drop the kept graphs: the next product builds them on its stream.

        Returns:
            Why that will not do: a graph of the user's own holds the nodes at which gradients of
            the parameters arrive, and with them another stream. None if there is no such graph.
        """
        self._forget()
        named = self._loss.named()
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

    def _apply(self, V: Tensor, out: Tensor, trusted: bool) -> None:
        rows = [self.layout.views(v) for v in V]
        with self._pass(trusted=trusted) as params:
            if self._complete:
                for i, graph in enumerate(self._graphs):
                    graph.block(rows, out, first=i == 0, keep=True)
                return
            try:
                with closing(self._loss.parts()) as parts:
                    for i, part in enumerate(parts):
                        keep = i < self._capacity
                        if i < len(self._graphs):
                            graph = self._graphs[i]
                        else:
                            graph = self._graph(part, params)
                            if keep:
                                self._graphs.append(graph)
                        graph.block(rows, out, first=i == 0, keep=keep)
                self._complete = self._capacity > i
            except BaseException:
                self._forget()
                raise

    def gradient(self) -> Tensor:
        """The gradient (n,) of the loss at the parameters as they are now."""
        with self._pass() as params, closing(self._loss.parts()) as parts:
            out = torch.zeros(self.n, dtype=self.dtype, device=self.device)
            for part in parts:
                gradient_into(out, self._value(part), params, part.weight)
            return out

    def loss(self, offset: Tensor | None = None) -> float:
        """The loss at theta, or at theta + ``offset`` (n,), summed over the data in float64.

        The parameters are replaced for the time of the call, not written. The value may be
        infinite or NaN far from theta.
        """
        if offset is not None:
            self._accepts("offset", offset, (1,))
        total = 0.0
        at, parts = self._at, self._loss.parts
        with self._pass(curved=False) as params, at(params, offset), closing(parts()) as every:
            for part in every:
                total += part.weight * float(self._loss.evaluate(part)[1].detach())
        return total

    @contextlib.contextmanager
    def _at(self, params: list[Tensor], offset: Tensor | None) -> Iterator[None]:
        held = [p.data for p in params]
        try:
            if offset is not None:
                for p, at, shift in zip(params, held, self.layout.views(offset), strict=True):
                    p.data = at + shift
            yield
        finally:
            for p, at in zip(params, held, strict=True):
                p.data = at

    def flatten(self, tensors: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
        """A vector (n,) from tensors by parameter name, or in the order of the parameters."""
        return self.layout.flatten(tensors)

    def unflatten(self, v: Tensor) -> dict[str, Tensor]:
        """Views of v (n,) by parameter name, in the parameters' shapes."""
        return self.layout.unflatten(v)


def _marks(p: Tensor) -> dict[str, bool]:
    """Notes on the node of the graph at which the gradient of p arrives."""
    marks: Any = get_gradient_edge(p).node.metadata
    return cast("dict[str, bool]", marks)
