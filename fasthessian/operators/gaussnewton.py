"""The generalised Gauss-Newton matrix of a model's loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasthessian.distributed.ranks import Group
from fasthessian.errors import InputError, UnsupportedError
from fasthessian.operators.jmj import JMJ
from fasthessian.operators.loss.batches import is_sequence, to_device
from fasthessian.operators.loss.criteria import option
from fasthessian.operators.loss.likelihood import Softmax
from fasthessian.operators.loss.part import Part
from fasthessian.operators.products.differences import distances
from fasthessian.operators.products.engines import gradient
from fasthessian.operators.products.linearised import Middle, SecondDerivative, second_derivative
from fasthessian.operators.products.options import Options
from fasthessian.operators.source import divided, of_model

PROBES = 8  # random directions in which the criterion is tested for convexity
CONCAVE = 1e-4  # the largest -u'Mu / (|u| |M u|) that counts as rounding
FUSED = (torch.float32, torch.float64)


class GaussNewton(JMJ):
    """G = sum of J' M J over the data, with J = dz/d theta and M = d^2 L/dz^2 at the outputs z.

    G is the curvature of the criterion, without that of the model (Schraudolph 2002, Fast curvature
    matrix-vector products). It is positive semidefinite if the criterion is convex in the outputs,
    like cross-entropy and mean squared error. It equals the Hessian if the model is linear in its
    parameters. The engine computes J v, the second derivative of the criterion multiplies by M, and
    a backward pass multiplies by J'. So G is exact for every criterion. For cross-entropy with
    class indices, one kernel multiplies by M, without a temporary of the size of the outputs.

    The arguments, defaults, attributes and errors are those of ``Hessian``. In addition, the model
    must return one tensor, or an output with ``.logits``.

    Raises:
        TypeError: the output is not a tensor.
        ValueError: the criterion is not convex in the outputs of the first batch, or the loss
            depends on the parameters other than through the outputs.

    Example:
        >>> import torch, fasthessian as fh
        >>> model = torch.nn.Linear(3, 1, bias=False)
        >>> x, y = torch.eye(3), torch.zeros(3, 1)
        >>> G = fh.GaussNewton(model, torch.nn.MSELoss(), (x, y))
        >>> G @ torch.tensor([3.0, 0.0, 0.0])
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
        precision: str | None = None,
        weights: str | Sequence[float] | Callable[[Any], float] = "auto",
        group: Group = None,
        mode: str = "eval",
        memory_budget: int | None = None,
        microbatch: int | None = None,
        weight_decay: float = 0.0,
    ) -> None:
        options = Options(
            engine, precision, mode, memory_budget, microbatch, weight_decay, group, divided(model)
        )
        super().__init__(
            lambda: of_model(model, criterion, data, params, weights, options),
            options,
        )

    def _middle(self, part: Part, z: Tensor, loss: Tensor) -> Middle | None:
        weight, smoothing = (option(self._loss.criterion, name)
                             for name in ("weight", "label_smoothing"))  # fmt: skip
        fused = z.dtype in FUSED and (weight is None or not smoothing)
        found = self._categorical(part, z, loss) if fused else None
        if found is not None and found.exact:
            return Softmax(found, z)
        return second_derivative(loss, z)

    def _unchecked_nodes(self, outputs: Any, loss: Tensor) -> list[str]:
        z = self._outputs(outputs)
        self._unchecked_in_loss = self._evaluation.functions.unchecked(loss, beyond=z.grad_fn)
        return super()._unchecked_nodes(outputs, loss) + self._unchecked_in_loss

    def _distances(self, part: Part, v: Tensor) -> tuple[float, float]:
        found = super()._distances(part, v)
        return max(found, self._middle_distances(part)) if self._unchecked_in_loss else found

    def _middle_distances(self, part: Part) -> tuple[float, float]:
        """How far M u is from differences of the criterion's gradients; see ``distances``."""
        with self._evaluation.conditions():
            outputs, loss = self._evaluation.outputs_and_value(part)
            z = self._outputs(outputs)
            middle = self._middle(part, z, loss)
            if outputs is not z or not is_sequence(part.batch) or self._loss.takes_model:
                names = ", ".join(self._unchecked_in_loss)
                raise UnsupportedError(
                    f"GaussNewton cannot check the second derivative of {names} in the loss; "
                    f"use Hessian, or a criterion of torch's operations"
                )
            target = to_device(part.batch, z.device)[-1]
            u = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)
            Mu = torch.zeros_like(z) if middle is None else middle(u.clone())

            def slope(h: float) -> Tensor:
                there = (z.detach() + h * u).requires_grad_()
                return gradient(self._loss.criterion(there, target), [there])[0]

            return distances(slope, float(z.detach().norm() or 1.0) / float(u.norm()), Mu)

    def _examine(self, z: Tensor, loss: Tensor, middle: Middle | None, params: Any) -> None:
        super()._examine(z, loss, middle, params)
        if isinstance(middle, SecondDerivative):
            check_convex(z, middle)


def check_convex(z: Tensor, middle: Middle) -> None:
    """Raise ValueError if u'Mu is negative for one of several random u."""
    generator = torch.Generator("cpu").manual_seed(0)
    for _ in range(PROBES):
        u = torch.randn(z.shape, generator=generator, dtype=torch.float64, device="cpu").to(z)
        Mu = middle(u)
        curvature, size = float((u * Mu).sum()), float(u.norm() * Mu.norm())
        if curvature < -CONCAVE * size:
            raise InputError(
                f"criterion is not convex in the outputs (u'Mu = {curvature:.3g} for a random "
                f"u), so GaussNewton is not positive semidefinite; use Hessian"
            )
