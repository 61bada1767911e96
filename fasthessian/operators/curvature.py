"""The base class of the curvature matrices: a product is a sum over the parts of the data."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn

from fasthessian.memory import out_of_memory
from fasthessian.operators import parameters
from fasthessian.operators.base import SymmetricOperator, finite
from fasthessian.operators.blocks import Block, partition
from fasthessian.operators.checks import Check, check
from fasthessian.operators.common import check_common
from fasthessian.operators.evaluation import Evaluation
from fasthessian.operators.examination import name_batch, prepare, unite
from fasthessian.operators.loss.part import Part
from fasthessian.operators.loss.protocol import Loss
from fasthessian.operators.products.engines import Graph, unused
from fasthessian.operators.products.kept_graphs import KeptGraphs
from fasthessian.operators.products.layer_factors import Layers
from fasthessian.operators.products.options import Options
from fasthessian.operators.request import Batches, Request
from fasthessian.operators.shares import Shares
from fasthessian.operators.source import Source
from fasthessian.operators.torch_state.lock import exclusive
from fasthessian.operators.torch_state.scopes import restored
from fasthessian.vectors import Layout


class Curvature(SymmetricOperator):
    """A curvature matrix of a loss: the weighted sum of the matrices of its parts.

    A part is one batch, or a microbatch of a batch. The subclass builds a graph for each part
    (``_graph``). The graph adds the product of its part to the total. As many graphs as fit into
    memory are kept between products (``_kept``). Evaluating the loss does not change the model or
    torch's global state (``_evaluation``).

    Attributes:
        n, dtype, device, matvecs: see ``SymmetricOperator``.
        layout: names, shapes and positions of the parameters in a flat vector.
        engine: how products are made, and why.
    """

    layout: Layout
    engine: str
    _places: Sequence[int]  # positions of the parameters among those of the graphs
    _kept: KeptGraphs
    _evaluation: Evaluation
    _loss: Loss
    _always_twice = False  # whether every engine differentiates custom functions twice
    _own: Mapping[str, Any] = {}  # arguments of the class, which all ranks must have in common
    _exact = False  # whether the matrix is the derivative of the gradient

    def __init__(self, source: Callable[[], Source], options: Options) -> None:
        """Check the loss, choose the engine and keep the first graph."""
        what = f"a product of {type(self).__name__}"

        def prepared() -> str:
            return self._evaluation.within_memory(lambda: prepare(self), what)

        with options.gathering() as chosen, options.ranks.leaving():
            note = options.ranks.together(exclusive(lambda: self._begin(source(), options)))
            self._agree()
            words = options.ranks.together(exclusive(prepared))
            self.engine = words + chosen + unite(self) + note

    def _begin(self, source: Source, options: Options) -> str:
        """Take over the loss and the options; return the note of the source for ``engine``."""
        loss, params = source.loss, source.params
        options.check(next(iter(params.values())).device, closure=loss.model is None)
        layout = Layout(params, parameters.common_dtype(params))
        dtypes = {name: p.dtype for name, p in params.items()}

        def current_parameters() -> dict[str, Tensor]:
            return parameters.current(layout, dtypes, loss.named_parameters())

        self.layout, self._places, self._loss = layout, range(len(params)), loss
        self._set_size(layout.n, layout.dtype, layout.device)
        self._kept = KeptGraphs(loss, current_parameters)
        self._evaluation = Evaluation(loss, layout, dtypes, options, self._kept, self._always_twice)
        self._layered = False  # whether a product with the block of a single layer was requested
        self._ranks = options.ranks
        self._shares = Shares(options.ranks, self._evaluation)
        return source.note

    def _agree(self, call: Mapping[str, str] | None = None) -> None:
        check_common(self._evaluation, {"operator": type(self).__name__, **self._own}, call or {})
        self._shares.agree()

    def _multiply(self, requests: Sequence[Request]) -> None:
        """Products with this matrix or with blocks of it, in one pass over the data.

        Each rank makes those of its part of the data. One sum over the ranks makes the whole.

        Raises:
            MemoryError: a product needs too much memory; the message names the option that helps.
        """
        self._shares.sum_products(requests, lambda: self._multiply_here(requests))

    @exclusive
    def _multiply_here(self, requests: Sequence[Request]) -> None:
        """Products with the data of this rank, without weight decay."""
        deferred = all(request.deferred for request in requests)
        blocks = (r.operator for r in requests if isinstance(r.operator, Block))
        if not self._layered and any(block.one_layer for block in blocks):
            self._kept.forget()  # graphs are rebuilt, with the factors of single layers
            self._layered = True
        self._evaluation.within_memory(lambda: self._sum_over_parts(requests))
        if self._ranks and not (deferred or all(finite(request.out) for request in requests)):
            self._evaluation.within_memory(lambda: name_batch(self, requests))

    def _sum_over_parts(self, requests: Sequence[Request]) -> None:
        """Write the products without weight decay: each graph adds the product of its part."""
        kept, deferred = self._kept, all(request.deferred for request in requests)
        evaluates = not kept.complete
        with self._evaluation.conditions(deferred=deferred, evaluates=evaluates) as params:
            if kept.complete:  # the data need not be read
                for i, graph in enumerate(kept.graphs):
                    graph.products(requests, first=i == 0, keep=True)
                return
            try:
                i = -1
                with closing(self._loss.parts()) as parts:
                    for i, part in enumerate(parts):
                        graph = self._kept_or_new_graph(i, part, params)
                        graph.products(requests, first=i == 0, keep=i < kept.capacity)
                if i < 0:  # this rank has no data
                    for request in requests:
                        request.out.zero_()
                kept.complete = kept.capacity > i >= 0
            except BaseException:
                kept.forget()
                raise

    def _kept_or_new_graph(self, i: int, part: Part, params: list[Tensor]) -> Graph:
        """The graph of the i-th part. A new graph is kept if fewer than ``capacity`` are kept."""
        if i < len(self._kept.graphs):
            return self._kept.graphs[i]
        graph = self._new_graph(part, params)
        if i < self._kept.capacity:
            self._keep(graph, part, params)
        return graph

    def _new_graph(self, part: Part, params: list[Tensor]) -> Graph:
        """Build the graph of a part, and tell it which rows have no gradient."""
        graph, findings = self._graph(part, params), self._evaluation.findings
        graph.padded = {place: row for place, row, tied in findings.padding if not tied}
        if findings.unreached and not self._options.keeps_graphs:
            # forward mode and differences would also move the parameters of detached layers
            idle = unused(self._evaluation.value(part), params, findings.unreached)
            graph.padded |= dict.fromkeys(idle, slice(None))
        return graph

    def _keep(self, graph: Graph, part: Part, params: list[Tensor]) -> None:
        """Keep a graph, and the factors of single layers if they are requested and fit."""
        model = self._loss.model
        if self._layered and self._options.keeps_factors and model is not None:
            # the factors need a second graph of the outputs
            needs = 2 * self._evaluation.findings.graph_bytes
            room = (self._options.room(self.device) - needs) / self._loss.count
            try:
                graph.layers = self._layers(model, part, params, room)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
        self._kept.graphs.append(graph)

    @property
    def _options(self) -> Options:
        return self._evaluation.options

    # A subclass defines these.

    def _graph(self, part: Part, params: list[Tensor]) -> Graph:
        """The graph of a part."""
        raise NotImplementedError

    def _layers(
        self, model: nn.Module, part: Part, params: list[Tensor], room: float
    ) -> Layers | None:
        """The factors of single layers, within ``room`` bytes; see ``layer_factors``."""
        raise NotImplementedError

    def _distances(self, part: Part, v: Tensor) -> tuple[float, float]:
        """How far the part's product with v (1, n) is from differences; see ``distances``."""
        raise NotImplementedError

    def _differentiated(self, outputs: Any, loss: Tensor) -> Tensor:
        """The scalar whose gradient is differentiated for a product."""
        return loss

    def _unchecked_nodes(self, outputs: Any, loss: Tensor) -> list[str]:
        """Names of unchecked nodes that products differentiate twice."""
        if not self._evaluation.twice:
            return []
        return self._evaluation.functions.unchecked(loss, self._options.engine == "forward")

    # The algorithms use these; see ``SymmetricOperator``.

    def _relative_error(self) -> float:
        return self._evaluation.relative_error()

    def _batches(self) -> Batches:
        return self._shares.batches()

    def _capture_obstacle(self) -> str | None:
        if not self._kept.every_part:
            return "the graphs of some batches are built at each product"
        return self._evaluation.capture_obstacle()

    # The public methods.

    def blocks(
        self, by: str | re.Pattern[str] | Mapping[str, str] | Callable[[str], str | None]
    ) -> dict[str, Block]:
        """The diagonal blocks of the matrix as operators by name.

        ``fh.eigsh``, ``fh.trace`` and ``fh.density`` accept the dictionary and return one. They
        advance all blocks together, with one pass over the data per step. For blocks of single
        layers, the derivatives of the outputs with respect to each layer's output are kept if
        ``memory_budget`` allows it. Their size is that of the activations times the number of
        classes.

        Args:
            by: how parameters are grouped. ``"layer"`` groups by the module that owns them,
                ``"stage"`` by the model's children or the entries of a ModuleList. A regular
                expression is searched in the names; its first group, or without groups the whole
                match, names the block. A mapping gives an expression for each block name. A
                callable takes a parameter's name and returns its block's name or None. Parameters
                without a block are left out.

        Raises:
            ValueError: no parameter matches, or two patterns match the same parameter.
            TypeError: ``by`` has another type.

        Example:
            >>> import torch, fasthessian as fh
            >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
            >>> H = fh.Hessian(model, torch.nn.MSELoss(), (torch.ones(4, 3), torch.ones(4, 1)))
            >>> {name: block.n for name, block in H.blocks("layer").items()}
            {'0': 8, '1': 3}
        """
        groups = partition(self.layout.names, by, self._loss.model)
        return {name: Block(self, self.layout, places) for name, places in groups.items()}

    def theta(self) -> Tensor:
        """The current parameters as one vector (n,)."""
        return self._evaluation.theta()

    def gradient(self, offset: Tensor | None = None) -> Tensor:
        """The gradient (n,) of the loss at theta, or at theta + ``offset`` (n,).

        Raises:
            MemoryError: it needs too much memory; the message names the option that helps.
        """
        if offset is not None:
            self._check_vector("offset", offset, (1,))
        out = torch.zeros(self.n, dtype=self.dtype, device=self.device)
        self._shares.sum([out], lambda: self._evaluation.add_gradient_(out, offset))
        return out

    def loss(self, offset: Tensor | None = None) -> float:
        """The loss at theta, or at theta + ``offset`` (n,), summed over the data in float64.

        The parameters are replaced during the call, but never written. Far from theta the value
        may be infinite or NaN.

        Raises:
            MemoryError: see ``gradient``.
        """
        if offset is not None:
            self._check_vector("offset", offset, (1,))
        return float(self._shares.losses([offset]))

    def losses(self, offsets: Tensor) -> Tensor:
        """The losses (b,) at theta + each row of ``offsets`` (b, n), in one pass over the data.

        They have the bits of ``loss``, in float64 on the CPU. b copies of the parameters are made.

        Raises:
            MemoryError: see ``gradient``.
        """
        self._check_vector("offsets", offsets, (2,))
        return self._shares.losses(list(offsets))

    def check(self) -> Check:
        """Measure errors with this model, data and engine that would raise no exception.

        * symmetry: whether the matrix is symmetric.
        * repetition: whether two products with the same vector are equal.
        * gradient: compares it with central differences of the loss along random signs.
        * difference: compares a product of the Hessian with central differences of gradients. If
          kinks (ReLU) make differences useless, it is compared with forward mode.
        * weights: whether the gradient of each batch is the mean of the gradients of its halves.

        If a row does not apply, it says why. Differences are useless for a loss that is computed in
        16 bits. Half of a batch may not be a valid batch of this model (graphs, time in the first
        dimension). Parameters that no gradient reaches are named. The check costs three products,
        nine gradients, and five to thirteen evaluations of the loss. ``print(A.check())`` shows one
        line per row.

        Returns:
            Check: the numbers, ``ok``, and the report.
        """
        if not self._ranks:
            return exclusive(check)(self, self._exact)
        # no collective under the lock of the process
        with self._options.gathered.open(), self._ranks.leaving():
            return restored(check)(self, self._exact)

    def flatten(self, tensors: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
        """A vector (n,) from tensors by parameter name, or in the order of the parameters.

        The tensor of a complex parameter may be complex, or real as ``unflatten`` returns it.
        """
        return self.layout.flatten(tensors)

    def unflatten(self, v: Tensor) -> dict[str, Tensor]:
        """Views of v (n,) by parameter name, in the parameters' shapes.

        The view of a complex parameter is real, with a last dimension of 2 like ``view_as_real``.
        """
        return self.layout.unflatten(v)
