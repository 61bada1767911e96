"""The generalised Gauss-Newton matrix of a model's loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fasthessian.errors import InputError, UnsupportedError
from fasthessian.operators.checks import distances
from fasthessian.operators.jmj import OuterCurvature
from fasthessian.operators.loss.batches import is_sequence, to_device
from fasthessian.operators.loss.criteria import option
from fasthessian.operators.loss.likelihood import Softmax
from fasthessian.operators.loss.model_loss import Part
from fasthessian.operators.products.engines import gradient
from fasthessian.operators.products.linearised import Middle, SecondDerivative, second_derivative

PROBES = 8  # random directions in which the criterion is looked at
CONCAVE = 1e-4  # of |u| |M u|: how far below 0 rounding takes u'Mu
FUSED = (torch.float32, torch.float64)


class GaussNewton(OuterCurvature):
    """G = sum over the data of J' M J, J = dz/d theta and M = d^2 L/dz^2 at the outputs z.

    The curvature of the criterion alone, carried to the parameters (Schraudolph 2002, Fast
    curvature matrix-vector products): positive semidefinite for a criterion that is convex in the
    outputs, as cross-entropy and mean squared error are; equal to the Hessian for a model that is
    linear in its parameters. J v by the engine, J' by backward, M by the criterion's own second
    derivative, so that any such criterion is exact; for cross-entropy with class indices M is one
    kernel, which makes no tensor of the size of the outputs.

    Arguments, attributes and errors are those of ``Hessian``; in addition the model must return one
    tensor, or an output with ``.logits``.

    Raises:
        TypeError: the outputs are no tensor.
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

    def _middle(self, part: Part, z: Tensor, loss: Tensor) -> Middle | None:
        weight, smoothing = (option(self._given.criterion, name)
                             for name in ("weight", "label_smoothing"))  # fmt: skip
        plain = z.dtype in FUSED and (weight is None or not smoothing)
        found = self._categorical(part, z, loss) if plain else None
        if found is not None and found.exact:
            return Softmax(found, z)
        return second_derivative(loss, z)

    def _suspects(self, outputs: Any, loss: Tensor) -> list[str]:
        z = self._outputs(outputs)
        self._behind = self._functions.untrusted(loss, beyond=z.grad_fn)
        return super()._suspects(outputs, loss) + self._behind

    def _distances(self, part: Part, v: Tensor) -> tuple[float, float]:
        found = super()._distances(part, v)
        return max(found, self._middle_distances(part)) if self._behind else found

    def _middle_distances(self, part: Part) -> tuple[float, float]:
        """Of M u from differences of slopes of the criterion."""
        with self._pass():
            outputs, loss = self._evaluated(part)
            z = self._outputs(outputs)
            middle = self._middle(part, z, loss)
            if outputs is not z or not is_sequence(part.batch) or self._given.takes_model:
                raise UnsupportedError(
                    f"GaussNewton cannot check the second derivative of {', '.join(self._behind)} "
                    f"in the loss; use Hessian, or a criterion of torch's operations"
                )
            target = to_device(part.batch, z.device)[-1]
            u = torch.randn(z.shape, generator=torch.Generator().manual_seed(0)).to(z)
            Mu = torch.zeros_like(z) if middle is None else middle(u.clone())

            def slope(h: float) -> Tensor:
                there = (z.detach() + h * u).requires_grad_()
                return gradient(self._given.criterion(there, target), [there])[0]

            return distances(slope, float(z.detach().norm() or 1.0) / float(u.norm()), Mu)

    def _examine(self, z: Tensor, loss: Tensor, middle: Middle | None, params: Any) -> None:
        super()._examine(z, loss, middle, params)
        if isinstance(middle, SecondDerivative):
            check_convex(z, middle)


def check_convex(z: Tensor, middle: Middle) -> None:
    """Raise ValueError if u'Mu is negative for a random u."""
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
