"""J v by forward mode or double backward, and the second derivative of a criterion."""

from __future__ import annotations

import contextlib
import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from fasthessian.operators.torch_state.scopes import UndoLog, scope

eager_transforms: Any = importlib.import_module("torch._functorch.eager_transforms")
Middle = Callable[[Tensor], Tensor]  # u -> M u; it may write into u


def forward_derivative(
    function: Callable[..., Any], at: Sequence[Tensor], tangents: Sequence[Tensor]
) -> Any:
    """The derivative of ``function`` at the tensors ``at`` along the tangents, in forward mode."""
    with _levels() as ended:
        with warnings.catch_warnings():  # torch warns at the first use
            warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
            try:
                found = torch.func.jvp(function, tuple(at), tuple(tangents))[1]
            except RuntimeError as error:
                # torch ends its levels in the wrong order if an interrupt falls into their exits
                if isinstance(error.__context__, KeyboardInterrupt):
                    raise error.__context__ from None
                raise
        ended.append(True)
        return found


@scope
def _levels(undo: UndoLog) -> list[bool]:
    """Close open levels of forward mode at the end, unless the returned list is not empty."""
    ended: list[bool] = []
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    undo(_close, ended, depth, eager_transforms.JVP_NESTING, forward_ad._current_level)
    undo(setattr, warnings, "filters", warnings.filters)
    return ended


def _close(ended: list[bool], depth: int, nesting: int, level: int) -> None:
    """Close the levels that are still open after an interrupt inside torch."""
    if ended:
        return
    torch._C._functorch.pop_dynamic_layer_stack_and_undo_to_depth(depth)
    eager_transforms.JVP_NESTING = nesting
    if level < 0:
        with contextlib.suppress(RuntimeError):  # none is open
            torch._C._exit_dual_level(level=0)
    forward_ad._current_level = level


class Linearised:
    """J v by double backward: u -> J'u is linear, and its backward is v -> J v."""

    def __init__(self, z: Tensor, params: Sequence[Tensor]) -> None:
        # an expanded scalar, because with large vocabularies z takes most of the memory
        self._u = z.detach().new_zeros(()).expand(z.shape).requires_grad_()
        grads = torch.autograd.grad(z, params, self._u, create_graph=True, allow_unused=True)
        self._edges = {
            i: get_gradient_edge(g)
            for i, g in enumerate(grads)
            if g is not None and g.requires_grad
        }

    def __call__(self, places: Sequence[int], tangents: Sequence[Tensor]) -> Tensor | None:
        """J v for the tangents at ``places``; None if z does not depend on these parameters."""
        used = [(self._edges[i], v) for i, v in zip(places, tangents, strict=True)
                if i in self._edges]  # fmt: skip
        if not used:
            return None
        (found,) = torch.autograd.grad(
            [edge for edge, _ in used], self._u, [v for _, v in used], retain_graph=True
        )
        return found


class SecondDerivative:
    """M u by double backward through the criterion."""

    def __init__(self, slopes: Tensor, z: Tensor) -> None:
        self._slopes, self._z = slopes, z

    def __call__(self, u: Tensor) -> Tensor:
        """M u, a new tensor."""
        (out,) = torch.autograd.grad(
            self._slopes, self._z, u, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return out


def second_derivative(loss: Tensor, z: Tensor) -> SecondDerivative | None:
    """M = d^2 loss / dz^2; None if the loss is linear in z, so that M = 0."""
    (slopes,) = torch.autograd.grad(
        loss, z, create_graph=True, allow_unused=True, materialize_grads=True
    )
    return SecondDerivative(slopes, z) if slopes.requires_grad else None
