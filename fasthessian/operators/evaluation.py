"""How a loss is evaluated: the state of torch and of the model during it, memory and rounding."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any, TypeVar

import torch
from torch import Tensor

from fasthessian import kernels
from fasthessian.errors import InputError, InsufficientMemoryError
from fasthessian.memory import out_of_memory
from fasthessian.operators.loss.coupling import Coupling
from fasthessian.operators.loss.part import REPEATED, ROUNDED, Part
from fasthessian.operators.loss.protocol import Loss
from fasthessian.operators.parameters import LOW
from fasthessian.operators.products.engines import gradient
from fasthessian.operators.products.function_guard import Functions
from fasthessian.operators.products.kept_graphs import KeptGraphs
from fasthessian.operators.products.options import Options
from fasthessian.operators.products.padding import Padding
from fasthessian.operators.torch_state import gradient_hooks
from fasthessian.operators.torch_state.lock import exclusive
from fasthessian.operators.torch_state.patches import patched
from fasthessian.operators.torch_state.product_state import product_state
from fasthessian.operators.torch_state.scopes import Scope, UndoLog
from fasthessian.vectors import Layout, real

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class Findings:
    """The results of the examination of the first part of the data."""

    coarsest: torch.dtype  # the dtype with the fewest bits that the loss is computed in
    graph_bytes: float = 0.0  # size of the graphs of all parts
    padding: tuple[Padding, ...] = ()
    unreached: tuple[int, ...] = ()  # positions of the parameters without gradient


class Evaluation:
    """A loss, and everything that is needed to evaluate and differentiate it.

    Args:
        loss: the loss.
        layout: the layout of the parameters in a vector.
        dtypes: the dtypes of the parameters, by name.
        options: the user's options.
        kept: the kept graphs, and the state that they depend on.
        always_twice: whether every engine differentiates custom functions twice.

    Attributes:
        loss, layout, options, kept: as given.
        mode: the mode of the modules. "own" sets modules that are not torch's to training mode.
        functions: the custom functions that the loss applies.
        hooks: the switch that disables hooks on gradients during a pass.
        findings: the results of the examination of the first part.
        common: the same of all ranks: what holds for each of them that has data.
        error: the largest ``relative_error`` of the ranks, as they agreed before a run.
    """

    def __init__(
        self,
        loss: Loss,
        layout: Layout,
        dtypes: Mapping[str, torch.dtype],
        options: Options,
        kept: KeptGraphs,
        always_twice: bool,
    ) -> None:
        self.loss, self.layout, self.options, self.kept = loss, layout, options, kept
        self.mode = options.mode
        self.functions = Functions()
        self.hooks = gradient_hooks.HookSwitch()
        self.findings = self.common = Findings(layout.dtype)
        self.error = 0.0
        self._dtypes, self._always_twice = dtypes, always_twice

    @property
    def twice(self) -> bool:
        """Whether products differentiate custom functions twice."""
        return self._always_twice or self.options.engine != "difference"

    def conditions(
        self,
        curved: bool = True,
        deferred: bool = False,
        exact: bool = False,
        mode: str | None = None,
        evaluates: bool = True,
    ) -> Scope[list[Tensor]]:
        """The scope of one pass. It protects the model and torch's state.

        The scope gives the current parameters. The caller holds the lock of the process.

        Args:
            curved: whether second derivatives are computed; False for the loss or its gradient.
                Layers stay patched until the derivatives are computed, because checkpointed
                layers run again then.
            deferred: compare only values whose version counter shows a write.
            exact: ignore the option ``precision``.
            mode: the mode of the modules, instead of ``self.mode``.
            evaluates: whether the loss may be evaluated; False if only kept graphs are used.
        """
        mode, precision = mode or self.mode, None if exact else self.options.precision

        def begin(undo: UndoLog) -> list[Tensor]:
            kept, loss = self.kept, self.loss
            params = list(kept.follow(deferred, evaluates or not deferred).values())
            copies = kept.copies if kept.capacity else None
            if evaluates or not kept.complete or not loss.counted:
                undo.after.append(kept.detector.ignore_own_changes)
            undo.enter(product_state(loss.roots, mode, self.layout.device, copies, precision))
            undo.enter(loss.protected())
            undo.enter(gradient_hooks.suspended(self.hooks, params))
            if not loss.counted:
                with Scope(self._patch):
                    loss.count_terms(params, self.repeated())
            if curved:
                self._patch(undo)
            return params

        return Scope(begin)

    def _patch(self, undo: UndoLog) -> None:
        """Until the undo, layers and custom functions can be differentiated twice."""
        undo.enter(patched())
        if self.twice:
            undo.enter(self.functions.watching())

    def count(self) -> None:
        """Follow changes, and count the terms of the loss if they are not counted."""
        with self.conditions(curved=False):
            pass

    def moved(self, params: list[Tensor], offset: Tensor | None) -> Scope[None]:
        """Inside this scope, the parameters are moved by the offset (n,)."""

        def move(undo: UndoLog) -> None:
            if offset is not None:
                self.loss.gathered.move(undo, params, self.layout.views(offset))

        return Scope(move)

    @exclusive
    def add_gradient_(self, out: Tensor, offset: Tensor | None) -> None:
        """Add the gradient at theta + ``offset`` over the data of this rank to ``out`` (n,).

        The first rank also adds that of the weight decay.
        """
        pack_ = kernels.select(self.layout.device).pack_

        def add() -> None:
            with (
                self.conditions() as params,
                self.moved(params, offset),
                closing(self.loss.parts()) as parts,
            ):
                for part in parts:
                    pieces = gradient(self.value(part), params)
                    flat = [real(p).to(out.dtype) for p in pieces]
                    pack_(out, flat, alpha=part.weight, beta=1.0)
                if self._decay:
                    views = self.layout.views(out)
                    for p, view in zip(params, views, strict=True):
                        theta = real(self.loss.gathered.value(p)).to(out.dtype)
                        view.add_(theta, alpha=self._decay)

        self.within_memory(add, "the gradient")

    @exclusive
    def add_losses_(self, out: Tensor, offsets: Sequence[Tensor | None]) -> None:
        """Add the losses at theta + each offset over the data of this rank to ``out`` (b,) float64.

        Each part of the data is read once. The first rank also adds the weight decay.
        """

        def add() -> None:
            totals = [0.0] * len(offsets)
            gathered = self.loss.gathered
            with self.conditions(curved=False) as params, closing(self.loss.parts()) as parts:
                points = [
                    None if offset is None
                    else gathered.moved_values(params, self.layout.views(offset))
                    for offset in offsets
                ]  # fmt: skip

                def at(i: int) -> Scope[None]:
                    def move(undo: UndoLog) -> None:
                        if (values := points[i]) is not None:
                            gathered.set_values(undo, params, values)

                    return Scope(move)

                for part in parts:
                    for i in range(len(points)):
                        with at(i):
                            totals[i] += part.weight * float(self.loss.evaluate(part)[1].detach())
                for i in range(len(points) if self._decay else 0):
                    with at(i):
                        thetas = (real(gathered.value(p)).double() for p in params)
                        totals[i] += self._decay / 2 * sum(float(x.square().sum()) for x in thetas)
            out.add_(torch.tensor(totals, dtype=out.dtype, device=out.device))

        self.within_memory(add, "the loss")

    def capture_obstacle(self) -> str | None:
        """Why a product by kept graphs cannot be captured in a CUDA graph; None if it can."""
        if self.loss.gathered:
            return "the parameters of a fully_shard model are gathered for each run"
        if self.functions.note():
            return "central differences of custom functions wait for the device"
        return None

    def theta(self) -> Tensor:
        """The current parameters (n,)."""
        gathered = self.loss.gathered
        out = torch.empty(self.layout.n, dtype=self.layout.dtype, device=self.layout.device)
        with gathered.open():
            named = self.loss.named_parameters()
            for name, view in self.layout.unflatten(out).items():
                view.copy_(real(gathered.value(named[name])))
        return out

    @property
    def _decay(self) -> float:
        return self.options.weight_decay if self.options.ranks.rank == 0 else 0.0

    def value(self, part: Part) -> Tensor:
        """The loss of a part. Raise ValueError if it is not finite."""
        return self.outputs_and_value(part)[1]

    def outputs_and_value(self, part: Part) -> tuple[Any, Tensor]:
        """The outputs and the loss of a part. Raise ValueError if the loss is not finite."""
        outputs, loss = self.loss.evaluate(part)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise InputError(
                f"the loss is {value} (batch {part.position} of data); "
                f"check the parameters, the inputs and the targets"
            )
        return outputs, loss

    @exclusive
    def coupling(self) -> Coupling:
        """Whether samples are coupled. In eval mode, since microbatches differ in dropout masks."""

        def measured() -> Coupling:
            with self.conditions(mode="eval") as params:
                return self.loss.coupling(params, self.repeated())

        return self.within_memory(measured, "the gradient of a batch")

    def within_memory(self, job: Callable[[], Result], what: str = "the product") -> Result:
        """Run the job and return its result. The caller holds the lock of the process.

        Raises:
            MemoryError: there is too little memory; the message names the option that helps.
        """
        try:
            return job()
        except RuntimeError as error:
            words = str(error)
            if not out_of_memory(error):
                raise
        # outside of the handler, because its traceback keeps the job's tensors alive
        self.kept.forget()
        needs, cuttable = self.findings.graph_bytes, self.loss.model is not None
        shortage = self.options.shortage(what, words, needs, self.layout.device, cuttable)
        raise InsufficientMemoryError(shortage)

    def mask_(self, v: Tensor) -> Tensor:
        """Set v to 0 where no gradient arrives: padding rows of embeddings, detached layers."""
        views = self.layout.views(v)
        for place, row, _ in self.common.padding:
            if row < len(views[place]):  # a computed weight may have more rows
                views[place][row] = 0
        for place in self.common.unreached:
            views[place].zero_()
        return v

    def unreached(self) -> str:
        """For ``engine``, the parameters without gradient, whose rows are zero; "" if none."""
        if not self.findings.unreached:
            return ""
        names = [self.layout.names[place] for place in self.findings.unreached]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        when = "" if self.loss.count == 1 else " in the first batch"
        return f"no gradient reaches {', '.join(names[:3])}{more}{when} (zero rows)"

    def rounded(self) -> bool:
        """Whether any part of the loss is computed in 16 bits."""
        low = any(dtype in LOW for dtype in self._dtypes.values())
        return low or self.common.coarsest in LOW or self.options.precision == "bf16"

    def repeated(self) -> float:
        """The largest accepted relative difference between two evaluations of the loss."""
        return ROUNDED if self.rounded() else REPEATED

    def relative_error(self) -> float:
        """The relative error of a product, from the parameters' dtypes, precision and engine."""
        errors = [self.error, *(torch.finfo(dtype).eps for dtype in self._dtypes.values())]
        errors.append(self.functions.error())
        errors.append({"bf16": 2.0**-8, "tf32": 2.0**-11}.get(self.options.precision or "", 0.0))
        if self.options.engine == "difference":
            errors.append(max(errors) ** (2 / 3))
        return max(errors)
