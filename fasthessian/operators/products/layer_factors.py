"""Blocks of single layers by factors: products with all blocks cost less than one full product.

The output s of a linear layer is linear in its parameters: s = B theta. Let J = dz/ds for the
outputs z of the model. The block of the layer is then B' J' M J B, where M is the second derivative
of the loss by z. J is kept. It has one row per sample and class, and needs one backward pass per
class; samples must be independent. A product then consists of two local products, B v and B' w, and
reads J twice. It involves no other layer. The Hessian has the same block if z is piecewise linear
in s (in ReLU networks, for example); this is checked.
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

from fasthessian.operators.products.linearised import Linearised, Middle
from fasthessian.operators.torch_state.layer_rewrites import no_folding
from fasthessian.operators.torch_state.scopes import UndoLog, restore_dict, scope

MOST = 64  # classes; with more of them, reading J costs more than a pass through the layers
LINEAR = (nn.Linear, _ConvNd, _BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.Embedding)
ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-10}  # relative error of a sum by its order


class Layer(NamedTuple):
    """One layer of one part: its parameters, B and J."""

    places: tuple[int, ...]  # positions of its parameters among all parameters
    params: tuple[Tensor, ...]
    output: Tensor  # s, with a graph that contains only the layer's parameters
    linear: Linearised  # B
    jacobian: Tensor  # J (N, C, number of outputs of the layer per sample)

    def tangent(self, places: Sequence[int], tangents: Sequence[Tensor]) -> Tensor:
        """J B v (N, C), for v given by parameter."""
        inner = [self.places.index(place) for place in places]
        s = self.linear(inner, tangents)
        if s is None:  # an unused parameter
            return self.jacobian.new_zeros(self.jacobian.shape[:2])
        # on a CPU, row times matrix is six times as fast as matrix times column
        return torch.bmm(s.reshape(len(s), 1, -1), self.jacobian.transpose(1, 2)).squeeze(1)

    def pull(self, places: Sequence[int], u: Tensor) -> Sequence[Tensor]:
        """B' J' u by parameter for u (N, C)."""
        delta = torch.bmm(u[:, None, :], self.jacobian).view_as(self.output)
        wanted = [self.params[self.places.index(place)] for place in places]
        return torch.autograd.grad(
            self.output, wanted, delta, retain_graph=True, allow_unused=True, materialize_grads=True
        )


class Layers:
    """The products with single-layer blocks of J' M J for one part of the loss."""

    def __init__(self, layers: Sequence[Layer], middle: Middle) -> None:
        self._middle = middle
        self._of = {place: layer for layer in layers for place in layer.places}

    def serves(self, places: Sequence[int]) -> bool:
        """Whether the parameters at ``places`` all belong to one of these layers."""
        layer = self._of.get(places[0])
        return layer is not None and all(place in layer.places for place in places)

    def pieces(self, places: Sequence[int], tangents: Sequence[Tensor]) -> Sequence[Tensor]:
        """The product without weight, split by parameter."""
        layer = self._of[places[0]]
        return layer.pull(places, self._middle(layer.tangent(places, tangents)))


class Call(NamedTuple):
    """Inputs and output of a call of a module; as edges of the graph, since tensors may change."""

    inputs: tuple[Any, ...]
    nodes: tuple[Any, ...]  # the nodes of the inputs
    edge: GradientEdge | None  # the edge of the output; None if the output has no graph


class _CallRecorder:
    """Records the calls of modules, by forward hooks."""

    def __init__(self) -> None:
        self.seen: dict[nn.Module, list[Call]] = {}

    def note(
        self, module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any
    ) -> None:
        real = isinstance(output, Tensor) and output.requires_grad and not named
        edge = get_gradient_edge(output) if real else None
        nodes = tuple(
            get_gradient_edge(x).node for x in inputs if isinstance(x, Tensor) and x.requires_grad
        )
        self.seen.setdefault(module, []).append(Call(inputs, nodes, edge))


@scope
def _watching(undo: UndoLog, modules: Sequence[nn.Module]) -> _CallRecorder:
    watch = _CallRecorder()
    for module in modules:
        for table in (module._forward_hooks, module._forward_hooks_with_kwargs):
            undo(restore_dict, table, dict(table))
        # before the user's hooks, because they may change the output
        module.register_forward_hook(watch.note, prepend=True, with_kwargs=True)
    return watch


def build(
    model: nn.Module,
    params: Sequence[Tensor],
    outputs: Callable[[], tuple[Tensor, Tensor]],
    middle: Callable[[Tensor, Tensor], Middle | None],
    room: float,
    through: bool,
) -> Layers | None:
    """The factors of all suitable layers; None if there are none, or if they do not fit.

    Args:
        model: the model that the layers belong to.
        params: all parameters.
        outputs: returns the outputs z (N, C) of the part, and the loss.
        middle: returns M, given z and the loss.
        room: the number of bytes that the factors may take, besides the graph of the outputs.
        through: require that M contains all curvature of the loss. The loss must depend on the
            parameters only through z, and z must be piecewise linear in each layer's output.
    """
    found = _candidates(model, params)
    with no_folding(), _watching(list(found)) as watch:
        z, loss = outputs()
    if not isinstance(z, Tensor) or z.is_complex() or z.dim() != 2 or not 0 < z.shape[1] <= MOST:
        return None
    once = {module: seen[0] for module, seen in watch.seen.items() if len(seen) == 1}
    edges = {module: call.edge for module, call in once.items() if call.edge is not None}
    if not edges:  # no layer of a known kind is called exactly once
        return None
    if through and not (_only_through(loss, z) and _piecewise_linear(z, list(edges.values()))):
        return None
    own: dict[nn.Module, tuple[Tensor, ...]] = {}
    output: dict[nn.Module, Tensor] = {}
    for module in edges:
        own[module] = tuple(params[place] for place in found[module])
        s = _isolated(module, once[module].inputs)
        if s is None or s.dtype != z.dtype or s.dim() == 0 or len(s) != len(z):
            continue
        elsewhere = _leaves(z, edges[module].node, once[module].nodes)
        if not elsewhere & {id(p) for p in own[module]} and _linear(s, own[module]):
            output[module] = s
    inputs = [x for module in output for x in once[module].inputs if isinstance(x, Tensor)]
    size = sum(x.numel() * x.element_size() for x in inputs)
    size += z.shape[1] * sum(s.numel() * s.element_size() for s in output.values())
    if not output or size > room:
        return None
    layers = []
    for module, J in _jacobians(z, {module: edges[module] for module in output}, output).items():
        B = Linearised(output[module], own[module])
        layers.append(Layer(found[module], own[module], output[module], B, J))
    M = middle(z, loss) if layers else None
    return None if M is None else Layers(layers, M)


def _isolated(module: nn.Module, inputs: tuple[Any, ...]) -> Tensor | None:
    """The layer's output with a graph that contains only its parameters; None without a graph."""
    given = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
    try:
        output = module.forward(*given)  # without the user's hooks
    except (RuntimeError, TypeError, ValueError):  # it depends on other state
        return None
    return output if isinstance(output, Tensor) and output.requires_grad else None


def _jacobians(
    z: Tensor, edges: dict[nn.Module, GradientEdge], output: dict[nn.Module, Tensor]
) -> dict[nn.Module, Tensor]:
    """J of each layer with independent samples. For other layers the sums here are wrong."""
    made = {module: s.new_empty(len(z), z.shape[1], s[0].numel()) for module, s in output.items()}

    def slopes(of: Tensor, weights: Tensor | None = None) -> list[Tensor]:
        found = torch.autograd.grad(
            of, list(edges.values()), weights, retain_graph=True, allow_unused=True
        )
        return [
            s.new_zeros(len(s), s[0].numel()) if g is None else g.reshape(len(s), -1)
            for g, s in zip(found, output.values(), strict=True)
        ]

    for c in range(z.shape[1]):
        for J, slope in zip(made.values(), slopes(z[:, c].sum()), strict=True):
            J[:, c] = slope
    r = _random(z, torch.Generator("cpu").manual_seed(1))
    kept = {}
    for (module, J), exact in zip(made.items(), slopes(z, r), strict=True):
        gap = torch.bmm(r[:, None, :], J).squeeze(1) - exact
        if gap.norm() <= ROUNDING.get(z.dtype, 0.0) * exact.norm():
            kept[module] = J
    return kept


def _candidates(model: nn.Module, params: Sequence[Tensor]) -> dict[nn.Module, tuple[int, ...]]:
    """Layers whose parameters have the usual names and are not shared, and their positions."""
    place = {id(p): i for i, p in enumerate(params)}
    uses = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    found: dict[nn.Module, tuple[int, ...]] = {}
    if getattr(nn.modules.module, "_global_forward_hooks", None):
        return found  # global hooks run before those of a module, and may change its output
    for module in model.modules():
        named = {name: id(p) for name, p in module._parameters.items() if p is not None}
        own = [each for each in named.values() if each in place]
        usual = set(named) <= {"weight", "bias"} and all(uses[each] == 1 for each in own)
        if isinstance(module, LINEAR) and own and usual:
            found[module] = tuple(place[each] for each in own)
    return found


def _leaves(z: Tensor, cut: Any, beyond: Sequence[Any] = ()) -> set[int]:
    """Ids of the leaves of z's graph, if the node ``cut`` led directly to the nodes ``beyond``."""
    found: set[int] = set()
    seen, nodes = {cut}, [z.grad_fn, *beyond]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        nodes += [following for following, _ in node.next_functions]
    return found


def _only_through(loss: Tensor, z: Tensor) -> bool:
    """Whether the loss depends on leaves only through z; a penalty term would not."""
    return not _leaves(loss, z.grad_fn)


def _is_curved(of: Sequence[Tensor], by: Sequence[Any]) -> bool:
    """Whether a derivative of the gradients ``of`` with respect to ``by`` is not exactly 0."""
    curved = [g for g in of if g is not None and g.requires_grad]
    if not curved:
        return False
    generator = torch.Generator("cpu").manual_seed(0)
    found = torch.autograd.grad(
        curved, by, [_random(g, generator) for g in curved], retain_graph=True, allow_unused=True
    )
    return any(g is not None and bool(g.any()) for g in found)


def _linear(s: Tensor, own: Sequence[Tensor]) -> bool:
    """Whether the output of a layer is linear in its parameters."""
    weights = _random(s, torch.Generator("cpu").manual_seed(2))
    grads = torch.autograd.grad(s, own, weights, create_graph=True, allow_unused=True)
    return not _is_curved(grads, own)


def _piecewise_linear(z: Tensor, edges: Sequence[GradientEdge]) -> bool:
    """Whether dz/ds does not change with any layer's output s."""
    weights = _random(z, torch.Generator("cpu").manual_seed(0))
    grads = torch.autograd.grad(z, edges, weights, create_graph=True, allow_unused=True)
    return not _is_curved(grads, edges)


def _random(like: Tensor, generator: torch.Generator) -> Tensor:
    dtype = torch.complex128 if like.is_complex() else torch.float64
    return torch.randn(like.shape, generator=generator, dtype=dtype, device="cpu").to(like)
