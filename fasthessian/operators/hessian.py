"""The Hessian of a model's loss, or of any scalar closure, as a symmetric operator."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn

from fasthessian.operators import parameters
from fasthessian.operators.base import SymmetricOperator
from fasthessian.operators.engines import (
    ENGINES,
    Graph,
    available_bytes,
    examine,
    gradient_into,
    metered,
    readable,
)
from fasthessian.operators.losses import ClosureLoss, ModelLoss, Part
from fasthessian.operators.rewrite import Rewrite
from fasthessian.operators.state import Snapshot, engaged
from fasthessian.vectors import Layout

REPEATED = 1e-3  # relative; two evaluations of one loss differ by rounding only


class Hessian(SymmetricOperator):
    """H = d^2 L / d theta^2 of the loss L(theta) over ``data``, known by its products.

    H v = d(g'v)/d theta, g = dL/d theta (Pearlmutter 1994, Fast exact multiplication by the
    Hessian), by double backward. L is the mean over the terms of the loss (or their sum, when the
    criterion sums), however the data are cut into batches.

    Args:
        model: a ``torch.nn.Module``. It is left as it was: parameters, buffers, ``.grad``,
            ``training`` flags and random states, also after an exception.
        criterion: ``criterion(model(inputs), targets)`` -> scalar; with a mapping batch
            ``criterion(outputs, batch)``; None when the model returns the loss, or an output with
            ``.loss`` or ``["loss"]``.
        data: a batch, a list of batches, or a re-iterable such as a DataLoader, which must yield
            the same samples at every pass (their order is free). A batch is ``(inputs, targets)``,
            a tuple of more (the last are the targets), or a mapping (``model(**batch)``).
        params: None for all that require gradients, or an iterable of names or parameters.
        engine: ``"retained"`` keeps the first-order graphs, ``"recompute"`` builds them at each
            product, ``"auto"`` keeps what fits ``memory_budget``.
        precision: None; products are made in the parameters' dtype.
        weights: ``"auto"`` counts the terms of each batch: valid targets for ``ignore_index``
            (times class weights), elements or samples otherwise. Or the number of terms per batch,
            as a sequence or as a callable of a batch. A mapping without a criterion counts its
            labels other than -100, from the second on for Hugging Face's causal language models.
        group: None.
        mode: ``"eval"``, or ``"train"``: dropout masks are then fixed, drawn once per batch.
        memory_budget: bytes for kept graphs; None is half of the free memory.

    Attributes:
        n, dtype, device, matvecs: as of ``SymmetricOperator``.
        layout: names, shapes and places of the parameters in a flat vector.

    A change of parameters, buffers or data in memory after construction is followed. Parameters
    that the loss does not use, or uses linearly, have zero rows.

    Raises:
        ValueError: no trainable parameters; a loss that is not a scalar, not finite, or does not
            depend on the parameters; empty data; mixed dtypes; an unknown option.
        TypeError: data or batches of no known form; parameters not float32 or float64.
        RuntimeError: the loader yields other samples than at the first pass; the loss differs
            between two evaluations; it cannot be differentiated twice.

    Example:
        >>> import torch, fasthessian as fh
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> x, y = torch.eye(3), torch.zeros(3, 1)
        >>> H = fh.Hessian(model, torch.nn.MSELoss(), (x, y))
        >>> H @ torch.tensor([3.0, 0.0, 0.0])
        tensor([2., 0., 0.])
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

    @classmethod
    def from_closure(
        cls,
        closure: Callable[[], Tensor],
        params: Iterable[Tensor] | Mapping[str, Tensor],
        *,
        engine: str = "auto",
        memory_budget: int | None = None,
    ) -> Hessian:
        """The Hessian of ``closure()``, a scalar loss, with respect to the tensors ``params``.

        For losses that are no criterion over batches: physics-informed networks, penalties,
        reinforcement learning. The closure may differentiate inside. Its random numbers from
        torch, NumPy or Python are the same at each call. Changes of ``params`` are followed, those
        of other tensors it reads only with ``engine="recompute"``.

        Raises:
            RuntimeError: two calls at the same parameters give different losses.

        Example:
            >>> import torch, fasthessian as fh
            >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
            >>> H = fh.Hessian.from_closure(lambda: w.pow(3).sum(), [w])
            >>> H @ torch.ones(2)
            tensor([ 6., 12.])
        """
        self = cls.__new__(cls)
        chosen = parameters.of_closure(params)
        self._prepare(ClosureLoss(closure, chosen), chosen, engine, "eval", memory_budget)
        return self

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
        with self._pass() as params, closing(loss.parts()) as parts:
            part = next(parts)
            self._choose(engine, memory_budget, self._try(part, params), part)
        if self._capacity and loss.replayable:
            with self._pass() as params:
                self._graphs.append(Graph(self._value(part), params, part.weight))

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
    def _pass(self, curved: bool = True) -> Iterator[list[Tensor]]:
        """The parameters as they are now, inside the conditions of a product.

        A pass that is not ``curved`` needs the loss alone. The rewrite spans the derivatives too,
        because checkpointed layers are run again there.
        """
        now = parameters.followed(self.layout, self._loss.named())
        if self._loss.changed():
            self._forget()
            self._loss.survey()
        if self._snapshot is not None and not self._snapshot.matches(self._loss.watched()):
            self._forget()
        if self._snapshot is None and self._capacity:
            self._snapshot = Snapshot(self._loss.watched())
        rewrite = Rewrite() if curved else contextlib.nullcontext()
        with engaged(self._loss.roots, self._mode, self.device), rewrite:
            yield list(now.values())

    def _forget(self) -> None:
        self._graphs.clear()
        self._complete, self._snapshot = False, None

    def _value(self, part: Part) -> Tensor:
        loss = self._loss.evaluate(part)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ValueError(
                f"the loss is {value} (batch {part.position} of data); "
                f"check the parameters, the inputs and the targets"
            )
        return loss

    def _apply(self, V: Tensor, out: Tensor) -> None:
        rows = [self.layout.views(v) for v in V]
        with self._pass() as params:
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
                            graph = Graph(self._value(part), params, part.weight)
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
                total += part.weight * float(self._loss.evaluate(part).detach())
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
