"""Matrices of the form J' M J: J is the Jacobian of the outputs, M a matrix at the outputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn

from fasthessian.errors import InputError, InputTypeError
from fasthessian.operators.curvature import Curvature
from fasthessian.operators.loss.calls import logits
from fasthessian.operators.loss.criteria import is_torch_loss
from fasthessian.operators.loss.likelihood import (
    Categorical,
    candidates,
    categorical,
    matches_slopes,
)
from fasthessian.operators.loss.model_loss import ModelLoss
from fasthessian.operators.loss.part import Part
from fasthessian.operators.products import layer_factors as layers
from fasthessian.operators.products.differences import distances
from fasthessian.operators.products.engines import Graph, difference
from fasthessian.operators.products.layer_factors import Layers
from fasthessian.operators.products.linearised import Linearised, Middle, forward_derivative
from fasthessian.operators.products.options import Options
from fasthessian.operators.source import Source
from fasthessian.operators.torch_state.lock import exclusive
from fasthessian.vectors import real

BYPASS = 1e-3  # largest share of the gradient not through the outputs that counts as rounding
Tangent = Callable[[Sequence[int], Sequence[Tensor]], "Tensor | None"]  # J v for one block


class JMJ(Curvature):
    """The sum of J' M J over the data; a subclass defines M (``_middle``)."""

    _loss: ModelLoss  # not a closure, because the outputs are needed
    _always_twice = True  # M is a second derivative with any engine

    def __init__(self, source: Callable[[], Source], options: Options) -> None:
        self._examined = False
        # for each part, the index of the candidate that equals its loss; None if there is none
        self._matches: dict[int, int | None] = {}
        self._survey = 0  # number of the survey of the data that these two attributes belong to
        super().__init__(source, options)

        def examine() -> None:
            conditions, parts = self._evaluation.conditions, self._loss.parts
            with conditions() as params, closing(parts()) as every:
                self._graph(next(every), params)

        @exclusive
        def examined() -> None:
            idle = self._ranks and not self._loss.count  # this rank has no data
            if not (self._examined or idle):  # because no graph is kept
                what = f"a product of {type(self).__name__}"
                self._evaluation.within_memory(examine, what)

        with options.gathered.open():
            self._ranks.together(examined)

    def _middle(self, part: Part, z: Tensor, loss: Tensor) -> Middle | None:
        """M for one part at its outputs z; None if M = 0."""
        raise NotImplementedError

    def _examine(self, z: Tensor, loss: Tensor, middle: Middle | None, params: Any) -> None:
        """Raise ValueError if the matrix is not defined for this loss. Called for one part."""
        check_path(z, loss, params, type(self).__name__)

    def _categorical(self, part: Part, z: Tensor, loss: Tensor) -> Categorical | None:
        """The loss as a cross-entropy of z; None if it is not a cross-entropy.

        A loss that is not torch's is compared with all candidates, once per part.
        """
        criterion = self._loss.criterion
        found = categorical(criterion, part, z)
        if found is not None or is_torch_loss(criterion):
            return found
        if part.position not in self._matches:
            (slopes,) = torch.autograd.grad(
                loss, z, retain_graph=True, allow_unused=True, materialize_grads=True
            )
            ways = enumerate(candidates(criterion, part.batch, z))
            held = (number for number, way in ways if matches_slopes(way, z, slopes))
            self._matches[part.position] = next(held, None)
        number = self._matches[part.position]
        if number is None:
            return None
        return next(itertools.islice(candidates(criterion, part.batch, z), number, None), None)

    def _graph(self, part: Part, params: list[Tensor]) -> Graph:
        if self._survey != self._kept.surveys:  # the data or the criterion changed
            self._matches.clear()
            self._examined, self._survey = False, self._kept.surveys
        outputs, loss = self._evaluation.outputs_and_value(part)
        z = self._outputs(outputs)
        if not (z.is_floating_point() and z.requires_grad and loss.requires_grad):
            raise InputError(
                f"the outputs ({z.dtype}) do not depend on the parameters; "
                f"{type(self).__name__} needs real outputs that do"
            )
        middle = self._middle(part, z, loss)
        if not self._examined:
            self._examine(z, loss, middle, params)
            self._examined = True
        if middle is None:
            return JMJGraph(z, params, part.weight, lambda places, tangents: None, _identity)
        return JMJGraph(z, params, part.weight, self._tangent(part, z, params), middle)

    def _differentiated(self, outputs: Any, loss: Tensor) -> Tensor:
        z = self._outputs(outputs)
        if z.is_complex():
            raise InputTypeError(
                f"the model returns {z.dtype} for {type(self).__name__}, which needs real outputs; "
                f"return torch.view_as_real(outputs), or use Hessian"
            )
        return z.sum() if z.requires_grad else loss  # this loss is refused later

    def _unchecked_nodes(self, outputs: Any, loss: Tensor) -> list[str]:
        if self._options.engine == "difference":
            return []
        functions, forward = self._evaluation.functions, self._options.engine == "forward"
        return functions.unchecked(self._outputs(outputs), forward)

    def _distances(self, part: Part, v: Tensor) -> tuple[float, float]:
        """How far J v is from differences. M needs no check, or has its own."""
        with self._evaluation.conditions() as params:
            z = self._outputs(self._evaluation.outputs_and_value(part)[0])
            Jv = self._tangent(part, z, params)(self._places, self.layout.views(v[0]))
            Jv = torch.zeros_like(z) if Jv is None else Jv

            def outputs(h: float) -> Tensor:
                with self._evaluation.moved(params, h * v[0]), torch.no_grad():
                    return self._outputs(self._loss.evaluate(part)[0])

            return distances(outputs, float(self.theta().norm() or 1.0) / float(v.norm()), Jv)

    def _layers(
        self, model: nn.Module, part: Part, params: list[Tensor], room: float
    ) -> Layers | None:
        def outputs() -> tuple[Tensor, Tensor]:
            found, loss = self._evaluation.outputs_and_value(part)
            return self._outputs(found), loss

        def middle(z: Tensor, loss: Tensor) -> Middle | None:
            return self._middle(part, z, loss)

        return layers.build(model, params, outputs, middle, room, through=False)

    def _outputs(self, outputs: Any) -> Tensor:
        z = logits(outputs)
        own = self._loss.criterion is None or self._loss.takes_model
        if own and isinstance(z, (tuple, list)):  # (outputs, loss)
            several = [each for each in z if isinstance(each, Tensor) and each.dim()]
            z = several[0] if len(several) == 1 else z
        if z is outputs and self._loss.criterion is None:
            raise InputTypeError(
                f"criterion must be given: {type(self).__name__} needs the loss as a function of "
                f"the outputs; for a model that returns its loss alone use Hessian"
            )
        if not isinstance(z, Tensor):
            got = "no call of it" if outputs is None else type(outputs).__name__
            raise InputTypeError(
                f"the model must return a tensor or an output with .logits for "
                f"{type(self).__name__}, got {got}; use Hessian"
            )
        return z

    def _tangent(self, part: Part, z: Tensor, params: list[Tensor]) -> Tangent:
        if self._options.engine == "forward":
            names = self.layout.names

            def forward(places: Sequence[int], tangents: Sequence[Tensor]) -> Tensor:
                def outputs(*values: Tensor) -> Tensor:
                    named = {names[i]: value for i, value in zip(places, values, strict=True)}
                    return self._outputs(self._loss.evaluate(part, named)[0])

                at = [params[i].detach() for i in places]
                return forward_derivative(outputs, at, tangents)  # type: ignore[no-any-return]

            return forward
        if self._options.engine == "difference":

            def central(places: Sequence[int], tangents: Sequence[Tensor]) -> Tensor | None:
                def outputs() -> list[Tensor]:
                    with torch.no_grad():
                        return [self._outputs(self._loss.evaluate(part)[0])]

                found = difference(outputs, [params[i] for i in places], tangents)
                return None if found is None else found[0]

            return central
        return Linearised(z, params)


def check_path(z: Tensor, loss: Tensor, params: Sequence[Tensor], name: str) -> None:
    """Raise ValueError if the loss depends on the parameters other than through z."""
    options: dict[str, Any] = {
        "retain_graph": True, "allow_unused": True, "materialize_grads": True,
    }  # fmt: skip
    (slopes,) = torch.autograd.grad(loss, z, **options)
    whole = torch.autograd.grad(loss, params, **options)
    through = torch.autograd.grad(z, params, slopes, **options)
    size = sum(float(real(g).double().square().sum()) for g in whole) ** 0.5
    pairs = zip(whole, through, strict=True)
    missed = sum(float(real(a - b).double().square().sum()) for a, b in pairs) ** 0.5
    if missed > BYPASS * size:
        raise InputError(
            f"the loss depends on the parameters other than through the outputs (or .logits): "
            f"{missed / size:.1%} of its gradient; {name} needs a criterion of one output alone, "
            f"use Hessian"
        )


def _identity(u: Tensor) -> Tensor:
    return u


class JMJGraph(Graph):
    """Products with J' M J of one part."""

    def __init__(
        self,
        z: Tensor,
        params: Sequence[Tensor],
        weight: float,
        tangent: Tangent,
        middle: Middle,
    ) -> None:
        super().__init__(params, weight)
        self._z, self._tangent, self._middle = z, tangent, middle

    def _pieces(
        self, places: Sequence[int], tangents: Sequence[Tensor], keep: bool
    ) -> Sequence[Tensor] | None:
        u = self._tangent(places, tangents)
        if u is None:
            return None
        return torch.autograd.grad(
            self._z,
            [self._params[i] for i in places],
            self._middle(u.to(self._z.dtype)),
            retain_graph=keep,
            allow_unused=True,
            materialize_grads=True,
        )


class Scores:
    """M u = sum of factor s (s'u) over the terms: one outer product s s' per term.

    Args:
        scores: (draws, *z.shape), one score s per draw and term.
        dims: the dimensions of z within one term.
        factor: a number, or a tensor that broadcasts against z.
    """

    def __init__(self, scores: Tensor, dims: tuple[int, ...], factor: Tensor | float) -> None:
        self._scores, self._dims, self._factor = scores, dims, factor

    def __call__(self, u: Tensor) -> Tensor:
        """M u, a new tensor."""
        out = torch.zeros_like(u)
        for s in self._scores:
            # with an empty tuple of dimensions, torch sums over all of them
            inner = (s * u).sum(self._dims, keepdim=True) if self._dims else s * u
            out.addcmul_(s, inner * self._factor)
        return out
