"""What the curvature matrices of a loss share: data, parameters, kept graphs, the pass."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn

from fasthessian import kernels
from fasthessian.errors import InputError
from fasthessian.operators import parameters
from fasthessian.operators.blocks import Block, partition
from fasthessian.operators.checks import Check, check, distances
from fasthessian.operators.loss.model_loss import ModelLoss, Part
from fasthessian.operators.passes import Passes
from fasthessian.operators.products.engines import gradient
from fasthessian.operators.products.options import Options
from fasthessian.operators.products.slopes import ALLOWED, distance
from fasthessian.operators.request import Request
from fasthessian.operators.torch_state.lock import exclusive
from fasthessian.operators.torch_state.module_state import keep_values
from fasthessian.operators.torch_state.scopes import Scope, UndoLog, set_attribute
from fasthessian.vectors import like, real


class Curvature(Passes):
    """A curvature matrix of a loss over data, by products with the graph of each part.

    A subclass makes the graphs (``_graph``); see ``Hessian`` for the arguments.

    Attributes:
        n, dtype, device, matvecs: as of ``SymmetricOperator``.
        layout: names, shapes and places of the parameters in a flat vector.
        engine: how products are made, and why.
    """

    _ordered = False  # whether the matrix depends on the order of the data
    _scaled = False  # whether the matrix of one batch depends on whether the loss is a sum
    _exact = False  # whether the matrix is the derivative of the gradient

    @exclusive
    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., Any] | None,
        data: Any,
        *,
        params: Iterable[str] | Iterable[Tensor] | None = None,
        engine: str = "auto",
        precision: str | None = None,
        weights: str | Sequence[float] | Callable[[Any], float] = "auto",
        group: None = None,
        mode: str = "eval",
        memory_budget: int | None = None,
        microbatch: int | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        if group is not None:
            raise InputError(f"group must be None, got {group!r}")
        options = Options(engine, precision, mode, memory_budget, microbatch, weight_decay)
        model, wrapper = parameters.unwrapped(model)
        chosen = parameters.of_model(model, params, wrapper)
        like = next(iter(chosen.values()))
        ordered, scaled = self._ordered, self._scaled
        loss = ModelLoss(model, criterion, data, weights, mode, like, microbatch, ordered, scaled)
        self._prepare(loss, chosen, options)
        if wrapper:
            self.engine += f"; {wrapper} unwrapped"

    @exclusive
    def _multiply(self, requests: Sequence[Request]) -> None:
        """Products by this matrix or by blocks of it, in one pass over the data.

        Raises:
            MemoryError: a product does not fit; what it needs and which option would help.
        """
        blocks = [request for request in requests if request.operator is not self]
        if not self._layered and any(self._of_one_layer(block.places) for block in blocks):
            self._forget()  # from now on factors of the layers are kept beside the graphs
            self._layered = True
        self._roomy(lambda: self._make(requests))
        if self._options.weight_decay:
            for request in requests:
                request.out.add_(request.V.detach(), alpha=self._options.weight_decay)

    def blocks(
        self, by: str | re.Pattern[str] | Mapping[str, str] | Callable[[str], str | None]
    ) -> dict[str, Block]:
        """The diagonal blocks of the matrix as operators by name.

        ``fh.eigsh``, ``fh.trace`` and ``fh.density`` take the dictionary, advance all blocks
        together in one pass over the data a round, and return a dictionary. For blocks of single
        layers the Jacobian of the outputs by each layer's is kept where ``memory_budget`` allows:
        as many times the activations as there are classes.

        Args:
            by: how parameters are grouped. ``"layer"``: by the module that owns them; ``"stage"``:
                by the model's children (entries of a ModuleList count each); a regular expression
                searched in the names, whose first group, or else whole match, names the block; a
                mapping of block names to such expressions; a callable of a parameter's name that
                returns its block or None. Parameters without a block are left out.

        Raises:
            ValueError: no parameter matches, or two patterns match the same one.
            TypeError: ``by`` has another type.

        Example:
            >>> import torch, fasthessian as fh
            >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
            >>> H = fh.Hessian(model, torch.nn.MSELoss(), (torch.ones(4, 3), torch.ones(4, 1)))
            >>> {name: block.n for name, block in H.blocks("layer").items()}
            {'0': 8, '1': 3}
        """
        model = self._loss.model if isinstance(self._loss, ModelLoss) else None
        groups = partition(self.layout.names, by, model)
        return {name: Block(self, places) for name, places in groups.items()}

    def _of_one_layer(self, places: Sequence[int]) -> bool:
        return len({self.layout.names[place].rpartition(".")[0] for place in places}) == 1

    def theta(self) -> Tensor:
        """The parameters as they are now, one vector (n,)."""
        named = self._loss.named_parameters()
        return self.flatten([real(named[k].detach()).to(self.dtype) for k in self.layout.names])

    @exclusive
    def gradient(self, offset: Tensor | None = None) -> Tensor:
        """The gradient (n,) of the loss at theta, or at theta + ``offset`` (n,).

        Raises:
            MemoryError: it does not fit; what it needs and which option would help.
        """
        if offset is not None:
            self._accepts("offset", offset, (1,))
        decay, at, parts = self._options.weight_decay, self._at, self._loss.parts
        pack_ = kernels.select(self.device).pack_

        def made() -> Tensor:
            out = torch.zeros(self.n, dtype=self.dtype, device=self.device)
            with self._pass() as params, at(params, offset), closing(parts()) as every:
                for part in every:
                    pieces = gradient(self._value(part), params)
                    pack_(
                        out, [real(p).to(self.dtype) for p in pieces], alpha=part.weight, beta=1.0
                    )
                return out.add_(self.theta(), alpha=decay) if decay else out

        return self._roomy(made, "the gradient")

    @exclusive
    def loss(self, offset: Tensor | None = None) -> float:
        """The loss at theta, or at theta + ``offset`` (n,), summed over the data in float64.

        The parameters are replaced for the time of the call, not written. The value may be
        infinite or NaN far from theta.

        Raises:
            MemoryError: as of ``gradient``.
        """
        if offset is not None:
            self._accepts("offset", offset, (1,))
        decay, at, parts = self._options.weight_decay, self._at, self._loss.parts

        def summed() -> float:
            total = 0.0
            with self._pass(curved=False) as params, at(params, offset), closing(parts()) as every:
                for part in every:
                    total += part.weight * float(self._loss.evaluate(part)[1].detach())
                if decay:
                    squares = sum(float(real(p.detach()).double().square().sum()) for p in params)
                    total += decay / 2 * squares
            return total

        return self._roomy(summed, "the loss")

    def _distances(self, part: Part, v: Tensor) -> tuple[float, float]:
        self.mask_(v[0])
        with self._pass() as params:
            out = torch.zeros_like(v)
            whole = part._replace(weight=1.0)
            graph = self._made_graph(whole, params)
            graph.products([Request(self, v, out)], first=True, keep=False)

            def slope(h: float) -> Tensor:
                with self._at(params, h * v[0]):
                    return self.flatten(gradient(self._value(part), params))

            return distances(slope, float(self.theta().norm() or 1.0) / float(v.norm()), out[0])

    def _compare_slope(self, part: Part) -> None:
        """Warn where the gradient of the first part is not the derivative of the loss.

        Unless that is so in eval mode alone: a model that differentiates inside may have autograd
        record it in training only. Then its own modules get that flag, if the loss is the same.
        Where custom functions make the gradient, ``engine`` says so instead.
        """
        if self.rounded():
            return  # differences would show rounding alone
        off = self._slope(part)[1]
        if not off > ALLOWED[self.coarsest]:
            return
        if self._mode == "eval" and self._loss.roots:
            loss = self._slope(part)[0]
            with contextlib.suppress(Exception):  # in training a model may want other inputs
                self._mode = "own"
                found, rest = self._slope(part)
                if math.isclose(found, loss, rel_tol=1e-6) and rest <= ALLOWED[self.coarsest]:
                    self.engine += "; the model's own modules have the flags of training: " + (
                        "in eval mode they detach a part of the loss"
                    )
                    return
            self._mode = "eval"
        if self._functions.met:  # straight-through estimates and reversed gradients are meant
            self.engine += (
                f"; the gradient, which custom functions make, differs by {off:.0%} from "
                f"differences of the loss"
            )
            return
        warnings.warn(
            f"the gradient differs by {off:.0%} from the derivative of {self._loss.origin}, which "
            f"detaches a part of itself; {type(self).__name__} is made from that gradient: right "
            f"if that is meant, else let autograd record all of it (create_graph=True)",
            stacklevel=8,
        )

    def _slope(self, part: Part) -> tuple[float, float]:
        """The loss of a part, and how far its gradient is from its derivative; see ``slopes``."""
        with self._pass() as params:

            def loss(offset: Tensor) -> float:
                with self._at(params, offset):
                    return float(self._loss.evaluate(part)[1].detach())

            value = self._value(part)
            g = self.mask_(self.flatten(gradient(value, params)))
            here = float(value.detach())
            return here, distance(loss, here, g, self.theta(), self.coarsest)

    def _at(self, params: list[Tensor], offset: Tensor | None) -> Scope[None]:
        """Inside, the parameters are moved by the offset (n,)."""

        def move(undo: UndoLog) -> None:
            held = keep_values(undo, params)
            if offset is not None:
                for p, at, shift in zip(params, held, self.layout.views(offset), strict=True):
                    p.data = at + like(shift, at)

        return Scope(move)

    def mask_(self, v: Tensor) -> Tensor:
        """Set v to 0 where gradients do not reach: padding rows of embeddings, detached layers."""
        views = self.layout.views(v)
        for place, row, _ in self._padding:
            if row < len(views[place]):  # a computed weight may have more rows
                views[place][row] = 0
        for place in self._unreached:
            views[place].zero_()
        return v

    @exclusive
    def by_forward(self, v: Tensor) -> Tensor:
        """The product with v (n,) by engine "forward", whatever the engine; it is not counted."""
        options, out = self._options, torch.empty_like(v[None])
        request = Request(self, v[None], out)

        def made() -> None:
            forward = dataclasses.replace(options, engine="forward")
            with (
                set_attribute(self, "_options", forward),
                self._pass() as params,
                closing(self._loss.parts()) as parts,
            ):
                for i, part in enumerate(parts):
                    graph = self._made_graph(part, params)
                    graph.products([request], first=i == 0, keep=False)

        self._roomy(made)
        return out[0].add_(v, alpha=options.weight_decay)

    @exclusive
    def check(self) -> Check:
        """Measure what could silently be wrong: on this model, these data and this engine.

        Symmetry of the matrix, repetition of a product, the gradient against central differences
        of the loss along random signs, a product against those of gradients (for the Hessian; where
        kinks as of ReLU spoil those, against forward mode), and the weights of batches: whether the
        gradient of each is that of its halves, unless half of a batch is no batch of this model
        (graphs, time in the first dimension). A row says where it does not apply, and why. What is
        computed in 16 bits has no differences.
        Parameters that no gradient reaches are named. Costs three products, nine gradients and five
        evaluations of the loss, or thirteen where the first do not suffice; ``print(A.check())``
        shows a line each.

        Returns:
            Check: the numbers, ``ok``, and the report.
        """
        return check(self, self._exact)

    def flatten(self, tensors: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
        """A vector (n,) from tensors by parameter name, or in the order of the parameters.

        Those of complex parameters may be complex, or real as of ``unflatten``.
        """
        return self.layout.flatten(tensors)

    def unflatten(self, v: Tensor) -> dict[str, Tensor]:
        """Views of v (n,) by parameter name, in the parameters' shapes.

        That of a complex parameter is real with a last dimension of 2, as of ``view_as_real``.
        """
        return self.layout.unflatten(v)
