"""The six helpers of PyHessian on lists of tensors, for scripts that build their own loops."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

Tensors = TypeVar("Tensors", bound=Sequence[Tensor])


def group_product(xs: Iterable[Tensor], ys: Iterable[Tensor]) -> Tensor:
    """Inner product of two lists of tensors: ``sum_i <xs[i], ys[i]>``, differentiable.

    Args:
        xs: tensors of any shapes.
        ys: tensors of the same shapes.

    Returns:
        A tensor of no dimension.

    Raises:
        ValueError: the lists differ in length.

    Example:
        >>> group_product([torch.ones(2), torch.ones(3)], [torch.ones(2), 2 * torch.ones(3)])
        tensor(8.)
    """
    xs, ys = list(xs), list(ys)
    if len(xs) != len(ys):
        raise ValueError(f"xs has {len(xs)} tensors and ys {len(ys)}; pass lists of one length")
    return sum((torch.sum(x * y) for x, y in zip(xs, ys, strict=True)), start=torch.zeros(()))


def group_add(params: Tensors, update: Sequence[Tensor], alpha: float | Tensor = 1) -> Tensors:
    """Add in place: ``params[i] += alpha * update[i]``; the same list is returned.

    As in PyHessian the tensors of ``params`` are overwritten, outside of autograd. Pass copies
    where the old values are still needed.

    Example:
        >>> group_add([torch.ones(2)], [torch.ones(2)], alpha=3)
        [tensor([4., 4.])]
    """
    with torch.no_grad():
        for p, u in zip(params, update, strict=True):
            p.add_(u * alpha)
    return params


def _norm(v: Iterable[Tensor]) -> float:
    """Return the norm over a whole list, in float64: squares of 1e-30 survive there."""
    parts = [torch.linalg.vector_norm(x.detach(), dtype=torch.float64) for x in v]
    return float(torch.linalg.vector_norm(torch.stack(parts))) if parts else 0.0


def normalization(v: Sequence[Tensor]) -> list[Tensor]:
    """Scale a list of tensors to unit norm over the whole list; a zero list stays zero.

    Nothing is added to the norm, so ``normalization(c * v) == normalization(v)`` for any ``c > 0``.

    Example:
        >>> normalization([torch.tensor([3.0]), torch.tensor([4.0])])
        [tensor([0.6000]), tensor([0.8000])]
    """
    norm = _norm(v)
    return [x / norm if norm else x.clone() for x in v]


def get_params_grad(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Return the trainable parameters and copies of their ``.grad``, zeros where there is none.

    A graph that ``backward(create_graph=True)`` left on ``.grad`` stays attached to the copies.
    """
    params: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    return params, [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in params]


def hessian_vector_product(
    gradsH: Sequence[Tensor | None], params: Sequence[Tensor], v: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """Differentiate ``<gradsH, v>`` by ``params``: the Hessian-vector product.

    The graph of ``gradsH`` is kept, so the call can be repeated, and works inside ``no_grad``.
    Gradients without a graph (unused or linear parameters) and None contribute nothing,
    parameters that nothing depends on get zeros.

    Args:
        gradsH: gradients computed with ``create_graph=True``.
        params: the parameters they were taken by.
        v: tensors shaped like ``gradsH``.

    Returns:
        Tensors shaped like ``params``, each with memory of its own.

    Raises:
        ValueError: ``gradsH`` and ``v`` differ in length or in a shape.
    """
    _check_shapes(gradsH, v)
    curved = [(g, x) for g, x in zip(gradsH, v, strict=True) if g is not None and g.requires_grad]
    if not curved:
        return tuple(torch.zeros_like(p) for p in params)
    with torch.inference_mode(False), torch.enable_grad():
        product = torch.autograd.grad(
            [g for g, _ in curved],
            list(params),
            grad_outputs=[x for _, x in curved],
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
    # Autograd may hand out one tensor for two parameters, an expanded one, or v itself;
    # a caller who writes into one of them would change the others.
    return tuple(hv.detach().clone(memory_format=torch.contiguous_format) for hv in product)


def _check_shapes(gradsH: Sequence[Tensor | None], v: Sequence[Tensor]) -> None:
    """Raise the one-line error for a vector that does not fit the gradients."""
    if len(gradsH) != len(v):
        raise ValueError(
            f"v has {len(v)} tensors and gradsH {len(gradsH)}; "
            "pass one tensor for each gradient (assign h.params and h.gradsH together)"
        )
    for i, (g, x) in enumerate(zip(gradsH, v, strict=True)):
        if g is not None and g.shape != x.shape:
            raise ValueError(
                f"v[{i}] has shape {tuple(x.shape)} and gradsH[{i}] {tuple(g.shape)}; "
                "pass tensors shaped like the gradients"
            )


def orthnormal(w: Sequence[Tensor], v_list: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Remove from ``w`` its parts along the unit vectors ``v_list``, then scale it to unit norm.

    Gram-Schmidt, twice: once leaves parts of the order of the cancellation. ``w`` is not changed.
    A ``w`` inside the span of ``v_list`` gives zeros instead of amplified rounding errors.
    """
    result = [x.detach().clone() for x in w]
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
