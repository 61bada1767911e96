"""Gradients with their graph, and operators made of products that the user's code computes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fasthessian.errors import InputError, InsufficientMemoryError
from fasthessian.memory import out_of_memory
from fasthessian.operators.base import SymmetricOperator
from fasthessian.operators.loss.calls import call, loss_of, scalar
from fasthessian.operators.loss.model_loss import ModelLoss
from fasthessian.operators.products.engines import examine
from fasthessian.operators.torch_state.lock import exclusive
from fasthessian.operators.torch_state.module_state import own_buffers
from fasthessian.operators.torch_state.product_state import product_state
from fasthessian.operators.torch_state.scopes import UndoLog, grad_mode, no_inference_mode, scope
from fasthessian.vectors import Layout

Product = Callable[[list[Tensor]], Sequence[Tensor | None]]


def same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two lists hold the same objects."""
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


@exclusive
def gradients(
    model: Any, criterion: Any, batch: Any, params: Sequence[Tensor], curved: bool = True
) -> list[Tensor | None]:
    """The gradients of the loss of one batch, with their graph; None for unused parameters.

    Raises:
        RuntimeError: ``curved`` is true and the loss has no second derivatives.
        MemoryError: the graph does not fit.
    """
    modules = [x for x in (model, criterion) if isinstance(x, nn.Module)]
    with product_state(modules, "eval", params[0].device):
        try:
            returned = call(model, criterion, batch)[1]
            loss = scalar(loss_of(returned, criterion is not None)[0], "criterion")
            if curved:
                examine(loss, params, ModelLoss.freed_graph_advice)
            return list(torch.autograd.grad(loss, params, create_graph=True, allow_unused=True))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            raise InsufficientMemoryError(
                f"the graph of the gradients does not fit the memory of {params[0].device}; pass "
                "the batch in parts: dataloader=list(zip(inputs.split(16), targets.split(16)))"
            ) from error


def leave(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
    """Replace ``.grad`` by copies of the gradients, with their graph."""
    with no_inference_mode(), grad_mode(True):
        for p, grad in zip(params, grads, strict=True):
            p.grad = None if grad is None else grad.clone()


class _WithoutGraph(torch.autograd.Function):
    """A gradient of the whole loss; the graphs of its parts are on other ranks."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, param: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise InputError(
            "gradsH of a hessian with group cannot be differentiated: each rank has the graph of "
            "its share of the data alone; use h.dataloader_hv_product(v), which sums over the ranks"
        )


def without_graph(grads: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of the loss of all ranks, whose derivatives by the parameters are refused.

    Without that, `hessian_vector_product` would return zeros, as for linear parameters.
    """
    with no_inference_mode(), grad_mode(True):
        return [_WithoutGraph.apply(g, p) for g, p in zip(grads, params, strict=True)]  # type: ignore[no-untyped-call]


def operator(product: Product, params: Sequence[Tensor]) -> tuple[SymmetricOperator, Layout]:
    """A product on lists of tensors as an operator on flat vectors, with their layout."""
    layout = Layout({f"params[{i}]": p for i, p in enumerate(params)})

    def matvec(v: Tensor) -> Tensor:
        zeros = layout.views(torch.zeros_like(v))
        pieces = product(layout.views(v.clone()))  # a copy: the user's code may write into it
        if len(pieces) != len(zeros):
            raise InputError(
                f"the product has {len(pieces)} tensors and params {len(zeros)}; "
                "return one tensor for each parameter"
            )
        pairs = zip(pieces, zeros, strict=True)
        return layout.flatten([zero if Hv is None else Hv.to(zero) for Hv, zero in pairs])

    A = SymmetricOperator(matvec, layout.n, dtype=layout.dtype, device=layout.device, check=False)
    return A, layout


@scope
def surroundings(undo: UndoLog, model: Any, params: Sequence[Tensor], force_eval: bool) -> None:
    """What PyHessian's callers expect: no old ``.grad``, and eval mode; both restored afterwards.

    The caller holds the lock of the process.
    """
    modules = [model] if isinstance(model, nn.Module) else []
    undo.enter(product_state(modules if force_eval else [], "eval", params[0].device))
    undo.enter(own_buffers(modules))
    tensors = [*params, *(p for module in modules for p in module.parameters())]
    for p in {id(p): p for p in tensors if p.is_leaf}.values():
        undo(setattr, p, "grad", p.grad)
        p.grad = None
