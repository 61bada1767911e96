"""The generalised Gauss-Newton matrix of a model's loss."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from fasthessian.operators.curvature import Curvature
from fasthessian.operators.engines import Graph
from fasthessian.operators.losses import Part

PROBES = 8  # random directions in which the criterion is looked at
OTHER_WAY = 1e-3  # share of the gradient that may miss the outputs, by rounding
CONCAVE = 1e-4  # of |u| |M u|: how far below 0 rounding takes u'Mu


class GaussNewton(Curvature):
    """G = sum over the data of J' M J, J = dz/d theta and M = d^2 L/dz^2 at the outputs z.

    The curvature of the criterion alone, carried to the parameters (Schraudolph 2002, Fast
    curvature matrix-vector products): positive semidefinite for a criterion that is convex in the
    outputs, as cross-entropy and mean squared error are; equal to the Hessian for a model that is
    linear in its parameters. J v by double backward, M by the criterion's own second derivative,
    J' by backward: any such criterion is exact.

    Arguments, attributes and errors are those of ``Hessian``; in addition the model must return one
    tensor, or an output with ``.logits``, and the criterion be given.

    Raises:
        TypeError: criterion is None, or the outputs are no tensor.
        ValueError: the criterion is not convex in the outputs, as looked at on the first batch; or
            the loss depends on the parameters in another way than through the output.

    Example:
        >>> import torch, fasthessian as fh
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> x, y = torch.eye(3), torch.zeros(3, 1)
        >>> G = fh.GaussNewton(model, torch.nn.MSELoss(), (x, y))
        >>> G @ torch.tensor([3.0, 0.0, 0.0])
        tensor([2., 0., 0.])
    """

    def __init__(self, model: Any, criterion: Any, data: Any, **options: Any) -> None:
        if criterion is None:
            raise TypeError(
                "criterion must be given: GaussNewton needs the loss as a function of the outputs; "
                "for a model that returns its loss use Hessian"
            )
        self._checked = False
        super().__init__(model, criterion, data, **options)
        if not self._checked:  # no graph is kept
            with self._pass() as params, closing(self._loss.parts()) as parts:
                self._graph(next(parts), params)

    def _graph(self, part: Part, params: list[Tensor]) -> Graph:
        outputs, loss = self._evaluated(part)
        z = getattr(outputs, "logits", outputs)
        if not isinstance(z, Tensor):
            raise TypeError(
                f"the model must return a tensor or an output with .logits for GaussNewton, "
                f"got {type(outputs).__name__}"
            )
        if not (z.is_floating_point() and z.requires_grad and loss.requires_grad):
            raise ValueError(
                f"the outputs ({z.dtype}) do not depend on the parameters; GaussNewton needs real "
                f"outputs that do"
            )
        graph = OuterGraph(z, loss, params, part.weight)
        if not self._checked:
            graph.check_path(loss)
            graph.check_convex()
            self._checked = True
        return graph


class OuterGraph(Graph):
    """J' M J of one part."""

    def __init__(self, z: Tensor, loss: Tensor, params: Sequence[Tensor], weight: float) -> None:
        self._params, self._weight = params, weight
        (self._slopes,) = torch.autograd.grad(
            loss, z, create_graph=True, allow_unused=True, materialize_grads=True
        )
        # J'u is linear in u, so its derivative in u is J
        self._u = torch.zeros_like(z, requires_grad=True)
        grads = torch.autograd.grad(z, params, self._u, create_graph=True, allow_unused=True)
        used = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]
        # a criterion that is linear in the outputs has M = 0
        self._curved = used if self._slopes.requires_grad else []
        self._edges = [get_gradient_edge(grads[i]) for i in self._curved]
        self._z = z

    def _backward(self, views: Sequence[Tensor], keep: bool) -> tuple[Tensor, ...]:
        (tangent,) = torch.autograd.grad(
            self._edges, self._u, [views[i] for i in self._curved], retain_graph=True
        )
        return torch.autograd.grad(
            self._z,
            self._params,
            self._times_m(tangent),
            retain_graph=keep,
            allow_unused=True,
            materialize_grads=True,
        )

    def _times_m(self, tangent: Tensor) -> Tensor:
        (out,) = torch.autograd.grad(
            self._slopes, self._z, tangent, retain_graph=True, allow_unused=True,
            materialize_grads=True,
        )  # fmt: skip
        return out

    def check_path(self, loss: Tensor) -> None:
        """Raise ValueError if the loss depends on the parameters other than through z."""
        options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
        params = self._params
        whole = torch.autograd.grad(loss, params, retain_graph=True, **options)
        slopes = self._slopes.detach()
        through = torch.autograd.grad(self._z, params, slopes, retain_graph=True, **options)
        size = sum(float(g.double().square().sum()) for g in whole) ** 0.5
        pairs = zip(whole, through, strict=True)
        missed = sum(float((a - b).double().square().sum()) for a, b in pairs) ** 0.5
        if missed > OTHER_WAY * size:
            raise ValueError(
                f"the loss depends on the parameters other than through the outputs (or .logits): "
                f"{missed / size:.1%} of its gradient; GaussNewton needs a criterion of one output "
                f"alone, use Hessian"
            )

    def check_convex(self) -> None:
        """Raise ValueError if u'Mu is negative for a random u."""
        if not self._curved:
            return
        generator = torch.Generator("cpu").manual_seed(0)
        for _ in range(PROBES):
            u = torch.randn(
                self._z.shape, generator=generator, dtype=torch.float64, device="cpu"
            ).to(self._z)
            Mu = self._times_m(u)
            curvature, size = float((u * Mu).sum()), float(u.norm() * Mu.norm())
            if curvature < -CONCAVE * size:
                raise ValueError(
                    f"criterion is not convex in the outputs (u'Mu = {curvature:.3g} for a random "
                    f"u), so GaussNewton is not positive semidefinite; use Hessian"
                )
