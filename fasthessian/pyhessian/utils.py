"""PyHessian's six helpers on lists of tensors, for scripts that write their own loops."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Optional, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Variable

from fasthessian.errors import InputError

# the names in PyHessian's module; scripts that import * use names of other modules from here
__all__ = [
    "Optional",
    "Variable",
    "get_params_grad",
    "group_add",
    "group_product",
    "hessian_vector_product",
    "math",
    "normalization",
    "np",
    "orthnormal",
    "torch",
]

Tensors = TypeVar("Tensors", bound=Iterable[Tensor])


def _pairs(first: str, xs: Iterable[Any], second: str, ys: Iterable[Any]) -> list[tuple[Any, Any]]:
    """Pairs of the tensors of two lists.

    Raises:
        ValueError: the lists differ in length.
    """
    xs, ys = list(xs), list(ys)
    if len(xs) != len(ys):
        raise InputError(
            f"{first} has {len(xs)} tensors and {second} {len(ys)}; pass lists of one length"
        )
    return list(zip(xs, ys, strict=True))


def group_product(xs: Iterable[Tensor], ys: Iterable[Tensor]) -> Tensor:
    """Inner product of two lists of tensors: ``sum_i <xs[i], ys[i]>``, differentiable.

    Args:
        xs: tensors of any shapes, or one tensor, whose rows are the list; the same holds for the
            other helpers.
        ys: tensors of the same shapes.

    Returns:
        A tensor without dimensions.

    Raises:
        ValueError: the lists differ in length.

    Example:
        >>> group_product([torch.ones(2), torch.ones(3)], [torch.ones(2), 2 * torch.ones(3)])
        tensor(8.)
    """
    pairs = _pairs("xs", xs, "ys", ys)
    return sum((torch.sum(x * y) for x, y in pairs), start=torch.zeros(()))


def group_add(params: Tensors, update: Iterable[Tensor], alpha: float | Tensor = 1) -> Tensors:
    """Add in place: ``params[i] += alpha * update[i]``; return ``params`` itself.

    As in PyHessian, the tensors of ``params`` are overwritten and autograd does not notice: a graph
    that was built before is valid again after the step is undone. Pass copies if the old values are
    needed later.

    Raises:
        ValueError: the lists differ in length.

    Example:
        >>> group_add([torch.ones(2)], [torch.ones(2)], alpha=3)
        [tensor([4., 4.])]
    """
    with torch.no_grad():
        for p, u in _pairs("params", params, "update", update):
            p.data.add_(u * alpha)
    return params


def _norm(v: Iterable[Tensor]) -> float:
    """The norm over a whole list, in float64, which can hold squares of 1e-30."""
    parts = [torch.linalg.vector_norm(x.detach(), dtype=torch.float64) for x in v]
    return float(torch.linalg.vector_norm(torch.stack(parts))) if parts else 0.0


def normalization(v: Iterable[Tensor]) -> list[Tensor]:
    """Scale a list of tensors to unit norm over the whole list; a zero list stays zero.

    Nothing is added to the norm, so ``normalization(c * v) == normalization(v)`` for any ``c > 0``.

    Example:
        >>> normalization([torch.tensor([3.0]), torch.tensor([4.0])])
        [tensor([0.6000]), tensor([0.8000])]
    """
    v = list(v)
    norm = _norm(v)
    return [x / norm if norm else x.clone() for x in v]


def get_params_grad(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return the trainable parameters and copies of their ``.grad``, zeros if there is none.

    A graph that ``backward(create_graph=True)`` attached to ``.grad`` stays attached to the copies.
    """
    params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    return params, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]


def hessian_vector_product(
    gradsH: Tensor | Iterable[Any], params: Tensor | Iterable[Tensor], v: Tensor | Iterable[Tensor]
) -> tuple[Tensor, ...]:
    """The Hessian-vector product: the derivative of ``<gradsH, v>`` by ``params``.

    The graph of ``gradsH`` is kept, so the call can be repeated; it also works inside ``no_grad``.
    Gradients without a graph (unused or linear parameters) contribute nothing, and neither do None
    and the numbers that PyHessian uses for a missing ``.grad``. Parameters that no gradient depends
    on get zeros. Each argument may be a list, a tuple, a generator or a single tensor.

    Args:
        gradsH: gradients computed with ``create_graph=True``.
        params: the parameters of these gradients.
        v: tensors shaped like ``gradsH``.

    Returns:
        Tensors shaped like ``params``, each with its own memory.

    Raises:
        ValueError: ``gradsH`` and ``v`` differ in length or in a shape.
    """
    params = _listed(params)
    pairs = _fitting(_listed(gradsH), _listed(v))
    curved = [(g, x) for g, x in pairs if isinstance(g, Tensor) and g.requires_grad]
    if not curved:
        return tuple(torch.zeros_like(p) for p in params)
    with torch.inference_mode(False), torch.enable_grad():
        product = torch.autograd.grad(
            [g for g, _ in curved],
            params,
            grad_outputs=[x for _, x in curved],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    # Autograd may return the same tensor for two parameters, an expanded tensor, or v itself; then
    # a caller who writes into one of them would change the others.
    return tuple(hv.detach().clone(memory_format=torch.contiguous_format) for hv in product)


def _listed(group: Tensor | Iterable[Any]) -> list[Any]:
    """The items as a list; a single tensor is a list of one, as in `torch.autograd.grad`."""
    return [group] if isinstance(group, Tensor) else list(group)


def _fitting(gradsH: list[Any], v: list[Tensor]) -> list[tuple[Any, Tensor]]:
    """Pairs of gradients and tensors of the vector; raises a one-line error if they do not fit."""
    if len(gradsH) != len(v):
        raise InputError(
            f"v has {len(v)} tensors and gradsH {len(gradsH)}; "
            "pass one tensor for each gradient (assign h.params and h.gradsH together)"
        )
    for i, (g, x) in enumerate(zip(gradsH, v, strict=True)):
        if isinstance(g, Tensor) and g.shape != x.shape:
            raise InputError(
                f"v[{i}] has shape {tuple(x.shape)} and gradsH[{i}] {tuple(g.shape)}; "
                "pass tensors shaped like the gradients"
            )
    return list(zip(gradsH, v, strict=True))


def orthnormal(w: Iterable[Tensor], v_list: Iterable[Iterable[Tensor]]) -> list[Tensor]:
    """Remove from ``w`` its parts along the unit vectors ``v_list``, then scale it to unit norm.

    Gram-Schmidt, applied twice, because once leaves parts of the order of the cancellation. ``w``
    does not change. If ``w`` lies in the span of ``v_list``, the result is zero instead of
    amplified rounding errors.
    """
    result, v_list = [x.detach().clone() for x in w], [list(v) for v in v_list]
    if not result:
        return result
    before = _norm(result)
    for _ in range(2):
        for v in v_list:
            group_add(result, v, alpha=-group_product(result, v))
    floor = 10 * torch.finfo(result[0].dtype).eps * before
    if v_list and _norm(result) <= floor:
        return [torch.zeros_like(x) for x in result]
    return normalization(result)
