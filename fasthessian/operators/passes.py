"""Passes over the data: the loss and its parameters, kept graphs, the conditions of a product."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fasthessian.errors import InputError, InsufficientMemoryError, UnsupportedError
from fasthessian.memory import out_of_memory
from fasthessian.operators import parameters
from fasthessian.operators.checks import compared, precision_error
from fasthessian.operators.kept_graphs import KeptGraphs
from fasthessian.operators.loss.closure_loss import ClosureLoss
from fasthessian.operators.loss.coupling import Coupling, coupling
from fasthessian.operators.loss.model_loss import REPEATED, ROUNDED, ModelLoss, Part
from fasthessian.operators.products.engines import Graph, coarsest, examine, metered, unused
from fasthessian.operators.products.function_guard import Functions
from fasthessian.operators.products.layer_factors import Layers
from fasthessian.operators.products.options import Options
from fasthessian.operators.products.padding import Padding, check_untied, padding
from fasthessian.operators.request import Request
from fasthessian.operators.torch_state import gradient_hooks
from fasthessian.operators.torch_state.lock import exclusive
from fasthessian.operators.torch_state.patches import patched
from fasthessian.operators.torch_state.product_state import product_state
from fasthessian.operators.torch_state.scopes import Scope, UndoLog
from fasthessian.vectors import Layout

Result = TypeVar("Result")


class Passes(KeptGraphs):
    """An operator whose products are sums over the parts of a loss; see ``Curvature``."""

    engine: str
    positions: Sequence[int]  # of the parameters among those of the graphs

    def _graph(self, part: Part, params: list[Tensor]) -> Graph:
        """The products of one part."""
        raise NotImplementedError

    def _prepare(
        self, loss: ModelLoss | ClosureLoss, chosen: dict[str, Tensor], options: Options
    ) -> None:
        options.check(next(iter(chosen.values())).device, isinstance(loss, ClosureLoss))
        self._options, self._mode = options, options.mode
        self._dtypes = {name: p.dtype for name, p in chosen.items()}
        self.layout = Layout(chosen, parameters.common_dtype(chosen))
        self.positions = range(len(chosen))
        self._describe(self.layout.n, self.layout.dtype, self.layout.device)
        self._loss = loss
        self._keep_none()
        self._hooks = gradient_hooks.HookSwitch()
        self.coarsest = self.layout.dtype  # in which a part of the loss is computed
        self._needs = 0.0  # bytes of the graphs of all parts
        self._padding: list[Padding] = []
        self._unreached: list[int] = []  # places of parameters without gradient
        self._layered = False  # whether blocks of single layers were asked for
        self._functions = Functions()
        self._untrusted: list[str] = []  # nodes of the graph whose second derivative is unknown
        self._roomy(self._open, f"a product of {type(self).__name__}")

    def _open(self) -> None:
        """Check the loss, choose the engine, keep the first graph."""
        loss = self._loss
        with self._pass() as params, closing(loss.parts()) as parts:
            part = next(parts)
            self._needs = self._try(part, params) * loss.size / part.size
            self._capacity, self.engine = self._options.choose(
                self._needs, loss.count, loss.fixed_order, self.device
            )
        if loss.note:
            self.engine += f"; {loss.note}"
        self._compare_slope(part)
        if self._options.microbatch:
            change, index, unseen = self.coupling()
            if change > self._repeated():
                raise InputError(
                    f"microbatch={self._options.microbatch} changes the gradient of batch {index} "
                    f"by {change:.1%}: the model or the criterion couples the samples of a batch; "
                    f"use microbatch=None"
                )
            if unseen:
                self.engine += f"; {unseen}"
        if self._capacity and loss.fixed_order:
            with self._pass() as params:
                self._keep(self._made_graph(part, params), part, params)
        if self._options.precision is not None:
            self.engine += precision_error(self, part)
        if self._untrusted:
            self.engine += compared(self, part, ", ".join(self._untrusted))
        self.engine += self._functions.words()
        if self._unreached:
            self.engine += f"; {self.unreached()}"
        if self._hooks.found:
            self.engine += "; hooks on gradients do not act"

    def _try(self, part: Part, params: list[Tensor]) -> int:
        """Check the loss of the first part; return the bytes that its graph holds."""
        with self._functions.learning():  # before a graph is looked at
            first = float(self._value(part).detach())
        try:
            with metered(params) as held:
                second = self._look(part, params)
                measured = held()
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):
                raise
            # a model that uses torch.func inside cannot be metered
            second, measured = self._look(part, params), 0
        if abs(second - first) > REPEATED * abs(first):
            raise UnsupportedError(
                f"{self._loss.origin} returned {first:.6g} and then {second:.6g} at the same "
                f"parameters and random seeds; H needs a loss that is a function of the parameters"
            )
        return measured

    def _look(self, part: Part, params: list[Tensor]) -> float:
        """The loss of a part, examined for the derivatives that products take."""
        outputs, loss = self._evaluated(part)
        curved = self._curved(outputs, loss)
        self._unreached = examine(
            curved, params, self._loss.freed_graph_advice, twice=self._options.keeps_graphs
        )
        self.coarsest = coarsest(loss)
        self._padding = list(padding(loss, params))
        if not self._options.keeps_graphs:
            check_untied(self._padding, self.layout.names, self._options.engine)
        self._untrusted = self._suspects(outputs, loss)
        return float(loss.detach())

    @property
    def _twice(self) -> bool:
        """Whether products differentiate custom functions twice."""
        return self._options.engine != "difference"

    def _suspects(self, outputs: Any, loss: Tensor) -> list[str]:
        """Names of nodes that products differentiate twice and that no check has seen."""
        if not self._twice:
            return []
        return self._functions.untrusted(loss, self._options.engine == "forward")

    def _distances(self, part: Part, v: Tensor) -> tuple[float, float]:
        """Of a product of the part with v (1, n) from differences; see ``distances``."""
        raise NotImplementedError

    def _compare_slope(self, part: Part) -> None:
        """Warn where the gradient of the first part is not the derivative of the loss."""
        raise NotImplementedError

    def _curved(self, outputs: Any, loss: Tensor) -> Tensor:
        """The scalar whose gradient is differentiated for a product."""
        return loss

    def _pass(
        self,
        curved: bool = True,
        trusted: bool = False,
        exact: bool = False,
        mode: str | None = None,
        evaluates: bool = True,
    ) -> Scope[list[Tensor]]:
        """The parameters as they are now, inside the conditions of a product.

        A pass that is not ``curved`` needs the loss alone. The rewrite spans the derivatives too,
        because checkpointed layers are run again there. ``exact`` passes over ``precision``,
        and ``mode`` over the user's. One that only reads kept graphs evaluates nothing. The caller
        holds the lock of the process.
        """
        mode, precision = mode or self._mode, None if exact else self._options.precision

        def begin(undo: UndoLog) -> list[Tensor]:
            now = self._follow(trusted, evaluates or not trusted)
            params = list(now.values())
            copies = self._copies if self._capacity else None
            if evaluates or not self._complete or not self._loss.counted:
                undo.after.append(self._watch.ignore_own_changes)
            undo.enter(product_state(self._loss.roots, mode, self.device, copies, precision))
            if isinstance(self._loss, ClosureLoss):
                undo.enter(self._loss.protected())
            undo.enter(gradient_hooks.suspended(self._hooks, params))
            self._count(params)
            if curved:
                self._rewrite(undo)
            return params

        return Scope(begin)

    def _rewrite(self, undo: UndoLog) -> None:
        """From now on layers and custom functions have derivatives that serve twice."""
        undo.enter(patched())
        if self._twice:
            undo.enter(self._functions.watching())

    def _count(self, params: list[Tensor], anyway: bool = False) -> None:
        """Count the terms of the loss, if that is due or ``anyway``."""
        if isinstance(self._loss, ModelLoss) and (anyway or not self._loss.counted):
            with Scope(self._rewrite):
                self._loss.count_terms(params, self._repeated())

    def _repeated(self) -> float:
        """The relative distance of two evaluations of one loss that is accepted."""
        return ROUNDED if self.rounded() else REPEATED

    def _made_graph(self, part: Part, params: list[Tensor]) -> Graph:
        graph = self._graph(part, params)
        graph.padded = {place: row for place, row, tied in self._padding if not tied}
        if self._unreached and not self._options.keeps_graphs:  # which see through detach()
            idle = unused(self._value(part), params, self._unreached)
            graph.padded |= dict.fromkeys(idle, slice(None))
        return graph

    def _keep(self, graph: Graph, part: Part, params: list[Tensor]) -> None:
        exact = self._options.precision != "bf16"
        if self._layered and exact and isinstance(self._loss, ModelLoss):
            count = self._loss.count  # the outputs are made again, with a graph of their own
            room = (self._options.room(self.device) - 2 * self._needs) / count
            try:
                graph.layers = self._layers(self._loss.model, part, params, room)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
        self._graphs.append(graph)

    def _layers(
        self, model: nn.Module, part: Part, params: list[Tensor], room: float
    ) -> Layers | None:
        """Factors of single layers; see ``layers``."""
        return None

    def unreached(self) -> str:
        """Which parameters have no gradient, and so zero rows; empty if none."""
        if not self._unreached:
            return ""
        names = [self.layout.names[place] for place in self._unreached]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        when = "" if self._loss.count == 1 else " in the first batch"
        return f"no gradient reaches {', '.join(names[:3])}{more}{when} (zero rows)"

    def rounded(self) -> bool:
        """Whether the loss is computed in 16 bits, wholly or in part."""
        low = any(dtype in parameters.LOW for dtype in self._dtypes.values())
        return low or self.coarsest in parameters.LOW or self._options.precision == "bf16"

    def relative_error(self) -> float:
        """The relative error of a product, by the parameters' dtype, the precision, the engine."""
        errors = [torch.finfo(dtype).eps for dtype in self._dtypes.values()]
        errors.append(self._functions.error())
        errors.append({"bf16": 2.0**-8, "tf32": 2.0**-11}.get(self._options.precision or "", 0.0))
        if self._options.engine == "difference":
            errors.append(max(errors) ** (2 / 3))
        return max(errors)

    @exclusive
    def coupling(self) -> Coupling:
        """See ``coupling.coupling``; in eval mode, as masks of dropout differ by microbatch."""
        loss = self._loss
        if not isinstance(loss, ModelLoss):
            return Coupling(math.nan, -1, "a closure has no batches")

        def found() -> Coupling:
            with self._pass(mode="eval") as params:
                if not callable(loss.terms.given):
                    with contextlib.suppress(ValueError):  # weights were given since none are right
                        self._count(params, anyway=True)
                return coupling(loss, params, self._repeated())

        return self._roomy(found, "the gradient of a batch")

    def _value(self, part: Part) -> Tensor:
        """The loss of a part, checked to be finite."""
        return self._evaluated(part)[1]

    def _evaluated(self, part: Part) -> tuple[Any, Tensor]:
        """The outputs and the loss of a part, checked to be finite."""
        outputs, loss = self._loss.evaluate(part)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise InputError(
                f"the loss is {value} (batch {part.position} of data); "
                f"check the parameters, the inputs and the targets"
            )
        return outputs, loss

    def _make(self, requests: Sequence[Request]) -> None:
        deferred = all(request.deferred for request in requests)
        with self._pass(trusted=deferred, evaluates=not self._complete) as params:
            if self._complete:
                for i, graph in enumerate(self._graphs):
                    graph.products(requests, first=i == 0, keep=True)
                return
            try:
                with closing(self._loss.parts()) as parts:
                    for i, part in enumerate(parts):
                        keep = i < self._capacity
                        if i < len(self._graphs):
                            graph = self._graphs[i]
                        else:
                            graph = self._made_graph(part, params)
                            if keep:
                                self._keep(graph, part, params)
                        graph.products(requests, first=i == 0, keep=keep)
                self._complete = self._capacity > i
            except BaseException:
                self._forget()
                raise

    def _roomy(self, job: Callable[[], Result], what: str = "the product") -> Result:
        """Do the job; a MemoryError that says the way out where memory does not suffice.

        The caller holds the lock of the process.
        """
        try:
            return job()
        except RuntimeError as error:
            words = str(error)
            if not out_of_memory(error):
                raise
        # outside of the handler: its traceback holds what was allocated so far
        self._forget()
        cuttable = isinstance(self._loss, ModelLoss)
        shortage = self._options.shortage(what, words, self._needs, self.device, cuttable)
        raise InsufficientMemoryError(shortage)
