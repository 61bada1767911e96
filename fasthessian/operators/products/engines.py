"""The engines: products of one part by double backward, forward mode, or differences."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge, saved_tensors_hooks

from fasthessian import kernels
from fasthessian.errors import InputError, UnsupportedError
from fasthessian.operators.products.layer_factors import Layers
from fasthessian.operators.products.linearised import forward_derivative
from fasthessian.operators.request import Request
from fasthessian.operators.torch_state.module_state import keep_values
from fasthessian.operators.torch_state.scopes import UndoLog, saving_hooks, scope
from fasthessian.vectors import like, real

ENGINES = ("auto", "retained", "recompute", "forward", "difference")
# Words in torch's errors for operations that it cannot differentiate twice, or in forward mode.
NOT_TWICE = ("not implemented", "not been implemented", "differentiate twice")
NOT_FORWARD = ("forward AD", "forward mode AD", "jvp", "ZeroTensors", "setup_context",
               "functorch transform", *NOT_TWICE)  # fmt: skip

Gradient = Callable[[Sequence[int]], Sequence[Tensor]]  # positions of parameters -> gradients


class Graph:
    """The products of one part of the loss; a subclass computes them by parameter (``_pieces``)."""

    _in_forward_mode = False  # whether products need derivatives in forward mode

    def __init__(self, params: Sequence[Tensor], weight: float) -> None:
        self._params, self._weight = params, weight
        self.layers: Layers | None = None  # factors of single layers, if they are kept
        self.padded: dict[int, int | slice] = {}  # parameter's position -> rows without gradient

    def products(self, requests: Sequence[Request], *, first: bool, keep: bool) -> None:
        """Add ``weight * H v`` to each row of each ``out``, or overwrite the row if ``first``.

        A request with ``each_part`` gets the product of this part alone. The graph can be used
        again only if ``keep``.
        """
        left = sum(len(request.V) for request in requests)
        for request in requests:
            each, places = request.each_part, request.places
            if each is not None:
                each.begin()
            rows, fresh = (request.out, first) if each is None else (each.product, True)
            pack_ = kernels.select(request.out.device).pack_
            params = [self._params[i] for i in places]
            for views, row in zip(request.pieces, rows, strict=True):
                left -= 1
                tangents = [like(v, p) for v, p in zip(views, params, strict=True)]
                for i, place in enumerate(places):
                    if place in self.padded:
                        tangents[i] = tangents[i].clone()
                        tangents[i][self.padded[place]] = 0
                pieces: Sequence[Tensor] | None
                with _engine_advice(self._in_forward_mode):
                    if self.layers is not None and self.layers.serves(places):
                        pieces = self.layers.pieces(places, tangents)
                    else:
                        pieces = self._pieces(places, tangents, keep or left > 0)
                if pieces is not None:
                    pieces = [real(piece).to(row.dtype) for piece in pieces]
                    pack_(row, pieces, alpha=self._weight, beta=0.0 if fresh else 1.0)
                elif fresh:
                    row.zero_()
            if each is not None:
                each.end(self._weight)

    def _pieces(
        self, places: Sequence[int], tangents: Sequence[Tensor], keep: bool
    ) -> Sequence[Tensor] | None:
        """The product without weight, split by parameter; None if it is 0."""
        raise NotImplementedError


class DoubleBackward(Graph):
    """H v = d(g'v)/d theta (Pearlmutter 1994) from the differentiable gradient of the part."""

    def __init__(self, loss: Tensor, params: Sequence[Tensor], weight: float) -> None:
        super().__init__(params, weight)
        grads: tuple[Tensor | None, ...] = (None,) * len(params)
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
        # The rows of H are 0 for a gradient that is constant in the parameters. For the others,
        # only the edges of the graph are kept, so the values of the gradients can be freed.
        self._edges = {
            i: get_gradient_edge(g)
            for i, g in enumerate(grads)
            if g is not None and g.requires_grad
        }

    def _pieces(
        self, places: Sequence[int], tangents: Sequence[Tensor], keep: bool
    ) -> Sequence[Tensor] | None:
        curved = [(self._edges[i], v) for i, v in zip(places, tangents, strict=True)
                  if i in self._edges]  # fmt: skip
        if not curved:
            return None
        return torch.autograd.grad(
            [edge for edge, _ in curved],
            [self._params[i] for i in places],
            [v for _, v in curved],
            retain_graph=keep,
            allow_unused=True,
            materialize_grads=True,
        )


class Forward(Graph):
    """H v as the derivative of the gradient along v, by forward over reverse; no graph is kept.

    ``loss(places, values)`` is the loss of the part if the parameters at the positions ``places``
    are ``values``. Reverse over forward is avoided, because torch 2.13 is silently wrong there.
    """

    _in_forward_mode = True

    def __init__(
        self,
        loss: Callable[[Sequence[int], Sequence[Tensor]], Tensor],
        params: Sequence[Tensor],
        weight: float,
    ) -> None:
        super().__init__(params, weight)
        self._loss = loss

    def _pieces(
        self, places: Sequence[int], tangents: Sequence[Tensor], keep: bool
    ) -> Sequence[Tensor]:
        def gradient(*values: Tensor) -> tuple[Tensor, ...]:
            found: tuple[Tensor, ...] = torch.func.grad(lambda values: self._loss(places, values))(
                values
            )
            return found

        at = [self._params[i].detach() for i in places]
        return forward_derivative(gradient, at, tangents)  # type: ignore[no-any-return]


class Difference(Graph):
    """H v as the central difference of gradients at theta +- h v, without second derivatives.

    ``gradient(places)`` is the gradient of the part at the current parameters. The error is about
    eps^(2/3) of the dtype relative to the third derivative: about 1e-4 in float32. With kinks
    (ReLU) the error is not bounded, because a step of any size crosses some of them.
    """

    def __init__(self, gradient: Gradient, params: Sequence[Tensor], weight: float) -> None:
        super().__init__(params, weight)
        self._gradient = gradient

    def _pieces(
        self, places: Sequence[int], tangents: Sequence[Tensor], keep: bool
    ) -> Sequence[Tensor] | None:
        return difference(
            lambda: self._gradient(places), [self._params[i] for i in places], tangents
        )


def difference(
    function: Callable[[], Sequence[Tensor]], params: Sequence[Tensor], tangents: Sequence[Tensor]
) -> Sequence[Tensor] | None:
    """Central difference of a function of the parameters along the tangents; None if they are 0.

    The step is relative to the size of the parameters; it does not depend on that of the tangents.
    """
    size = _norm(tangents)
    if not size:
        return None
    eps = max(torch.finfo(p.dtype).eps for p in params)
    h = eps ** (1 / 3) * (_norm(params) or 1.0) / size
    ends = []
    for step in (h, -h):
        with _moved(params, tangents, step):
            ends.append([end.detach() for end in function()])
    return [(a - b).div_(2 * h) for a, b in zip(*ends, strict=True)]


@scope
def _moved(
    undo: UndoLog, params: Sequence[Tensor], tangents: Sequence[Tensor], step: float
) -> None:
    for p, at, v in zip(params, keep_values(undo, params), tangents, strict=True):
        p.data = torch.add(at, v, alpha=step)


def _norm(tensors: Sequence[Tensor]) -> float:
    squares = [real(t.detach()).double().square().sum() for t in tensors]
    return float(torch.stack(squares).sum().sqrt())


@contextlib.contextmanager
def _engine_advice(forward: bool) -> Iterator[None]:
    """If torch does not have the derivative, name an engine that works."""
    try:
        yield
    except RuntimeError as error:  # NotImplementedError is one
        first = str(error).splitlines()[0]
        if "RuntimeError: KeyboardInterrupt" in str(error):  # Ctrl-C inside TorchScript
            raise KeyboardInterrupt from error
        if forward and any(words in str(error) for words in NOT_FORWARD):
            raise UnsupportedError(
                f"torch cannot differentiate the gradient in forward mode: {first}; "
                f"use engine='retained' or 'recompute', or 'difference' if they fail too"
            ) from error
        if any(words in str(error) for words in NOT_TWICE):
            raise UnsupportedError(
                f"the loss has no second derivative in torch: {first}; "
                f"engine='difference' needs first ones only, and no kinks such as ReLU's"
            ) from error
        raise


def gradient(loss: Tensor, params: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradient of the loss, with zeros for parameters that it does not depend on."""
    if not loss.requires_grad:
        return [torch.zeros_like(p) for p in params]
    return torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)


def unused(loss: Tensor, params: Sequence[Tensor], places: Sequence[int]) -> list[int]:
    """The positions of the parameters that no gradient reaches."""
    if not loss.requires_grad:
        return list(places)
    grads = torch.autograd.grad(loss, [params[i] for i in places], allow_unused=True)
    return [i for i, grad in zip(places, grads, strict=True) if grad is None]


def examine(loss: Tensor, params: Sequence[Tensor], freed: str, twice: bool = True) -> list[int]:
    """Check that the loss depends on the parameters and can be differentiated once or ``twice``.

    Returns the positions of the parameters that no gradient reaches. ``freed`` is the message for a
    loss whose graph was freed.

    For a custom function marked ``once_differentiable`` torch returns a second derivative of zero
    without an error, because its error node is not on the path to the parameters. If the gradient
    of the output requires gradients, every such node is in the graph, even next to constants.
    """
    grads: tuple[Tensor | None, ...] = ()
    if loss.requires_grad:
        seed = torch.ones_like(loss, requires_grad=True)
        try:
            grads = torch.autograd.grad(loss, params, seed, create_graph=twice, allow_unused=True)
        except RuntimeError as error:
            if "graph a second time" not in str(error):
                raise
            raise UnsupportedError(freed) from error
    if all(grad is None for grad in grads):
        raise InputError(
            f"the loss does not depend on any of the {len(params)} parameters; "
            f"is it computed from detached tensors, or by a model that differentiates inside in "
            f"training only (mode='train')?"
        )
    for node in nodes_from([g.grad_fn for g in grads if g is not None] if twice else []):
        if node.name() == "torch::autograd::Error":
            raise UnsupportedError(
                "the loss has no second derivative: a custom autograd function in it is marked "
                "once_differentiable; write its backward with differentiable operations, or use "
                "engine='difference', which needs first derivatives only"
            )
    return [i for i, grad in enumerate(grads) if grad is None]


def nodes_from(starts: Iterable[Node | None]) -> Iterator[Node]:
    """The given nodes of a graph, and all nodes that can be reached from them."""
    nodes = list(starts)
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        if node is None:
            continue
        yield node
        fresh = {following for following, _ in node.next_functions} - seen
        seen |= fresh
        nodes += fresh


def coarsest(loss: Tensor) -> torch.dtype:
    """The dtype with the fewest bits that any part of the loss is computed in.

    It differs from that of the parameters if the model uses autocast or converts its outputs.
    """
    found = {loss.dtype}
    for node in nodes_from([loss.grad_fn]):
        found |= {each.dtype for each in getattr(node, "_input_metadata", ())}
    floats = [dtype for dtype in found if dtype.is_floating_point or dtype.is_complex]
    return max(floats, key=lambda dtype: torch.finfo(dtype).eps).to_real()


@contextlib.contextmanager
def metered(params: Sequence[Tensor]) -> Iterator[Callable[[], int]]:
    """Measure graphs that are built inside this context, which cannot be used after its end.

    The value of the context is a function that returns the bytes that the graphs save, without the
    parameters. What an outer hook on saved tensors keeps instead of a tensor has no size.
    """
    saved: list[Any] = []
    outer = saving_hooks(True) if saving_hooks is not None else None

    def pack(tensor: Tensor) -> int:
        saved.append(tensor if outer is None else outer[0](tensor))
        return len(saved) - 1

    def unpack(place: int) -> Tensor:
        kept: Tensor = saved[place]
        return kept if outer is None else outer[1](kept)

    def total() -> int:
        tensors = [t for t in saved if isinstance(t, Tensor) and t.layout is torch.strided]
        storages = [t.untyped_storage() for t in tensors]
        held = {storage.data_ptr(): storage.nbytes() for storage in storages}
        own = {p.untyped_storage().data_ptr() for p in params}
        return sum(size for address, size in held.items() if address not in own)

    try:
        with saved_tensors_hooks(pack, unpack):
            yield total
    finally:
        # a graph that holds its tensors through hooks is a cycle that the collector cannot free
        saved.clear()
