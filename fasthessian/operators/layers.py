"""Blocks of single layers by factors: the products of all layers for less than that of the whole.

The output s of a linear layer is linear in its parameters: s = B theta. With J = dz/ds, a matrix
J' M J of the loss has the block B' J' M J B of that layer. J is kept, one row a class and sample,
by one backward pass a class, since samples do not meet. A product is then two local ones, B v and
B' w, and two readings of J; nothing runs through the layers between. The block of the Hessian is
the same where z is piecewise linear in s, as in ReLU networks: looked at, not assumed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from fasthessian.operators.linearised import Linearised, Middle
from fasthessian.operators.rewrite import unfolded

MOST = 64  # classes: above, reading J costs more than running through the layers
LINEAR = (nn.Linear, _ConvNd, _BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.Embedding)
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-10}  # relative, of sums in two orders


class Layer(NamedTuple):
    """One layer of one part: its parameters, B and J."""

    places: tuple[int, ...]  # of its parameters among all
    params: tuple[Tensor, ...]
    output: Tensor  # of the layer, with the graph of its own parameters alone
    along: Linearised  # B
    jacobian: Tensor  # J (N, C, numbers in the output of a sample)

    def tangent(self, places: Sequence[int], tangents: Sequence[Tensor]) -> Tensor:
        """J B v (N, C) for v by parameter."""
        inner = [self.places.index(place) for place in places]
        s = self.along(inner, tangents)
        assert s is not None  # every layer depends on each of its parameters
        # as a row from the left: on a CPU six times the speed of a column from the right
        return torch.bmm(s.reshape(len(s), 1, -1), self.jacobian.transpose(1, 2)).squeeze(1)

    def pull(self, places: Sequence[int], u: Tensor) -> Sequence[Tensor]:
        """B' J' u by parameter for u (N, C)."""
        delta = torch.bmm(u[:, None, :], self.jacobian).view_as(self.output)
        wanted = [self.params[self.places.index(place)] for place in places]
        return torch.autograd.grad(self.output, wanted, delta, retain_graph=True)


class Layers:
    """The products with single-layer blocks of J' M J for one part of the loss."""

    def __init__(self, layers: Sequence[Layer], middle: Middle) -> None:
        self._middle = middle
        self._of = {place: layer for layer in layers for place in layer.places}

    def serves(self, places: Sequence[int]) -> bool:
        """Whether the parameters at ``places`` are all of one layer known here."""
        layer = self._of.get(places[0])
        return layer is not None and all(place in layer.places for place in places)

    def pieces(self, places: Sequence[int], tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        """The product by parameter, unweighted."""
        layer = self._of[places[0]]
        return layer.pull(places, self._middle(layer.tangent(places, tangents)))


class _Watch:
    """Notes what goes into and comes out of modules, by forward hooks."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.seen: dict[nn.Module, list[tuple[tuple[Any, ...], GradientEdge | None]]] = {}
        self._handles = [module.register_forward_hook(self._note) for module in modules]

    def _note(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        # the edge, because the output may be overwritten by what follows
        real = isinstance(output, Tensor) and output.requires_grad
        edge = get_gradient_edge(output) if real else None
        self.seen.setdefault(module, []).append((inputs, edge))

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()


def build(
    model: nn.Module,
    params: Sequence[Tensor],
    outputs: Callable[[], tuple[Tensor, Tensor]],
    middle: Callable[[Tensor, Tensor], Middle | None],
    room: float,
    through: bool,
) -> Layers | None:
    """The factors of every layer that has them; None if there are none, or they do not fit.

    Args:
        model: whose layers are meant.
        params: all parameters, by place.
        outputs: makes the outputs z of the part, which must be (N, C), and the loss.
        middle: M from z and the loss.
        room: bytes that the factors may take.
        through: require that all curvature of the loss is in M: the loss depends on z alone, and z
            is piecewise linear in each layer's output.
    """
    found = _candidates(model, params)
    with unfolded(), _Watch(list(found)) as watch:
        z, loss = outputs()
    if not isinstance(z, Tensor) or z.dim() != 2 or not 0 < z.shape[1] <= MOST:
        return None
    once = {module: seen[0] for module, seen in watch.seen.items() if len(seen) == 1}
    edges = {module: edge for module, (_, edge) in once.items() if edge is not None}
    if through and not (_only_way(loss, z) and _piecewise_linear(z, list(edges.values()))):
        return None
    locals_ = {}
    for module in edges:
        inputs = [x.detach() if isinstance(x, Tensor) else x for x in once[module][0]]
        output = module.forward(*inputs)  # without the user's hooks
        if output.shape[0] == len(z):
            locals_[module] = output
    size = z.shape[1] * sum(s.numel() * s.element_size() for s in locals_.values())
    if not locals_ or size > room:
        return None
    rows = {module: s.new_empty(len(z), z.shape[1], s[0].numel()) for module, s in locals_.items()}
    for c in range(z.shape[1]):
        grads = torch.autograd.grad(
            z[:, c].sum(), [edges[module] for module in rows], retain_graph=True, allow_unused=True
        )
        for J, grad in zip(rows.values(), grads, strict=True):
            J[:, c] = 0 if grad is None else grad.reshape(len(z), -1)
    layers = []
    for module, J in rows.items():
        own = tuple(params[place] for place in found[module])
        B = Linearised(locals_[module], own)
        layers.append(Layer(found[module], own, locals_[module], B, J))
    M = middle(z, loss)
    if M is None or not _adds_up(layers, z, params):
        return None
    return Layers(layers, M)


def _candidates(model: nn.Module, params: Sequence[Tensor]) -> dict[nn.Module, tuple[int, ...]]:
    """Layers that are linear in their parameters, with the places of those; none are shared."""
    place = {id(p): i for i, p in enumerate(params)}
    uses = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    found: dict[nn.Module, tuple[int, ...]] = {}
    for module in model.modules():
        own = [id(p) for p in module._parameters.values() if id(p) in place]
        if isinstance(module, LINEAR) and own and all(uses[each] == 1 for each in own):
            found[module] = tuple(place[each] for each in own)
    return found


def _only_way(loss: Tensor, z: Tensor) -> bool:
    """Whether the graph of the loss reaches leaves through z alone: no penalty stands beside it."""
    seen, nodes = {z.grad_fn, None}, [loss.grad_fn]
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        seen.add(node)
        assert node is not None
        if not node.next_functions:
            return False
        nodes += [following for following, _ in node.next_functions]
    return True


def _piecewise_linear(z: Tensor, edges: Sequence[GradientEdge]) -> bool:
    """Whether dz/ds does not change with any s: then its derivative is 0 to the last bit."""
    generator = torch.Generator("cpu").manual_seed(0)

    def random(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=like.dtype, device="cpu").to(like)

    grads = torch.autograd.grad(z, edges, random(z), create_graph=True, allow_unused=True)
    bent = [g for g in grads if g is not None and g.requires_grad]
    if not bent:
        return True
    found = torch.autograd.grad(
        bent, edges, [random(g) for g in bent], retain_graph=True, allow_unused=True
    )
    return not any(g is not None and bool(g.any()) for g in found)


def _adds_up(layers: Sequence[Layer], z: Tensor, params: Sequence[Tensor]) -> bool:
    """Whether J v is the sum over the layers, v random.

    It is not if samples meet, or a layer does not use its parameters as it seems to.
    """
    generator = torch.Generator("cpu").manual_seed(1)
    places: list[int] = []
    tangents: list[Tensor] = []
    total = torch.zeros_like(z)
    for layer in layers:
        v = [torch.randn(p.shape, generator=generator, dtype=p.dtype, device="cpu").to(p)
             for p in layer.params]  # fmt: skip
        total += layer.tangent(layer.places, v)
        places += layer.places
        tangents += v
    exact = Linearised(z, params)(places, tangents)
    return exact is not None and bool(
        (total - exact).norm() <= ROUNDING.get(z.dtype, 0.0) * exact.norm()
    )
