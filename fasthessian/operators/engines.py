"""Products by double backward: the first-order graph of a part, what it holds, what fits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from fasthessian import kernels

ENGINES = ("auto", "retained", "recompute")


class Graph:
    """The gradient of one part, differentiable: H v = d(g'v)/d theta (Pearlmutter 1994)."""

    def __init__(self, loss: Tensor, params: Sequence[Tensor], weight: float) -> None:
        grads: tuple[Tensor | None, ...] = (None,) * len(params)
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
        # a gradient that is constant in the parameters has no rows in H; edges of the graph stand
        # for the others, so that their values need not stay in memory
        self._curved = [i for i, g in enumerate(grads) if g is not None and g.requires_grad]
        self._edges = [get_gradient_edge(grads[i]) for i in self._curved]  # type: ignore[arg-type]
        self._params, self._weight = params, weight

    def block(
        self, rows: Sequence[Sequence[Tensor]], out: Tensor, *, first: bool, keep: bool
    ) -> None:
        """Add ``weight * H v`` to each row of out (b, n), or write it there if ``first``.

        ``rows`` holds the pieces of each v in the shapes of the parameters. The graph can serve
        again only if ``keep``.
        """
        if not self._edges:
            if first:
                out.zero_()
            return
        pack_ = kernels.select(out.device).pack_
        for i, (views, row) in enumerate(zip(rows, out, strict=True)):
            pieces = self._backward(views, keep or i + 1 < len(rows))
            pack_(row, pieces, alpha=self._weight, beta=0.0 if first else 1.0)

    def _backward(self, views: Sequence[Tensor], keep: bool) -> tuple[Tensor, ...]:
        try:
            return torch.autograd.grad(
                self._edges,
                self._params,
                [views[i] for i in self._curved],
                retain_graph=keep,
                allow_unused=True,
                materialize_grads=True,
            )
        except RuntimeError as error:
            if "not implemented" in str(error) or "differentiate twice" in str(error):
                raise RuntimeError(
                    f"the loss has no second derivative in torch: {str(error).splitlines()[0]}"
                ) from error
            raise


def gradient_into(out: Tensor, loss: Tensor, params: Sequence[Tensor], weight: float) -> None:
    """``out += weight * gradient of loss``."""
    if loss.requires_grad:
        pieces = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
        kernels.select(out.device).pack_(out, pieces, alpha=weight, beta=1.0)


def examine(loss: Tensor, params: Sequence[Tensor]) -> None:
    """Check that the loss depends on the parameters and can be differentiated twice.

    torch gives zeros, without a word, where the second derivative runs into a custom function
    marked ``once_differentiable``: its error node hangs off the way to the parameters. A seed that
    requires gradients makes every such node appear in the graph, also behind constants.
    """
    grads: tuple[Tensor | None, ...] = ()
    if loss.requires_grad:
        seed = torch.ones_like(loss, requires_grad=True)
        grads = torch.autograd.grad(loss, params, seed, create_graph=True, allow_unused=True)
    nodes = [grad.grad_fn for grad in grads if grad is not None]
    if not nodes:
        raise ValueError(
            f"the loss does not depend on any of the {len(params)} parameters; "
            f"is it computed from detached tensors?"
        )
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        if node.name() == "torch::autograd::Error":
            raise RuntimeError(
                "the loss has no second derivative: a custom autograd function in it is marked "
                "once_differentiable; write its backward with differentiable operations"
            )
        fresh = {following for following, _ in node.next_functions} - seen
        seen |= fresh
        nodes += fresh


@contextlib.contextmanager
def metered(params: Sequence[Tensor]) -> Iterator[Callable[[], int]]:
    """A function that tells the bytes saved by graphs built inside, parameters left out.

    The graphs cannot be used after the end of the context.
    """
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        saved.append(tensor)
        return len(saved) - 1

    def total() -> int:
        storages = [t.untyped_storage() for t in saved if t.layout is torch.strided]
        held = {storage.data_ptr(): storage.nbytes() for storage in storages}
        own = {p.untyped_storage().data_ptr() for p in params}
        return sum(size for address, size in held.items() if address not in own)

    try:
        with saved_tensors_hooks(pack, saved.__getitem__):
            yield total
    finally:
        # a graph that owned its tensors through hooks would be a cycle that no collector sees
        saved.clear()
