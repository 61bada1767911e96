"""What the curvature matrices of a loss share: products as sums over the parts of the data."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn

from fasthessian import kernels
from fasthessian.memory import out_of_memory
from fasthessian.operators import parameters
from fasthessian.operators.base import SymmetricOperator
from fasthessian.operators.blocks import Block, partition
from fasthessian.operators.checks import Check, check
from fasthessian.operators.evaluation import Evaluation
from fasthessian.operators.examination import prepare
from fasthessian.operators.loss.model_loss import Part
from fasthessian.operators.loss.protocol import Loss
from fasthessian.operators.products.engines import Graph, gradient, unused
from fasthessian.operators.products.kept_graphs import KeptGraphs
from fasthessian.operators.products.layer_factors import Layers
from fasthessian.operators.products.options import Options
from fasthessian.operators.request import Request
from fasthessian.operators.source import Source
from fasthessian.operators.torch_state.lock import exclusive
from fasthessian.vectors import Layout, real


class Curvature(SymmetricOperator):
    """A curvature matrix of a loss: the weighted sum of the matrices of its parts.

    A part is one batch, or a microbatch of it. The subclass builds a graph for each part
    (``_graph``), which adds its share to a product. Graphs are kept from product to product as far
    as memory allows (``_kept``). The loss is evaluated under conditions that protect the model and
    torch's global state (``_evaluation``).

    Attributes:
        n, dtype, device, matvecs: as of ``SymmetricOperator``.
        layout: names, shapes and places of the parameters in a flat vector.
        engine: how products are made, and why.
    """

    layout: Layout
    engine: str
    _places: Sequence[int]  # of the parameters among those of the graphs
    _kept: KeptGraphs
    _evaluation: Evaluation
    _loss: Loss
    _always_twice = False  # whether every engine differentiates custom functions twice
    _exact = False  # whether the matrix is the derivative of the gradient

    def __init__(self, source: Source, options: Options) -> None:
        """Check the loss, choose the engine and keep the first graph.

        The caller holds the lock of the process.
        """
        loss, params = source.loss, source.params
        options.check(next(iter(params.values())).device, closure=loss.model is None)
        layout = Layout(params, parameters.common_dtype(params))
        dtypes = {name: p.dtype for name, p in params.items()}

        def followed() -> dict[str, Tensor]:
            return parameters.followed(layout, dtypes, loss.named_parameters())

        self.layout, self._places, self._loss = layout, range(len(params)), loss
        self._describe(layout.n, layout.dtype, layout.device)
        self._kept = KeptGraphs(loss, followed)
        self._evaluation = Evaluation(loss, layout, dtypes, options, self._kept, self._always_twice)
        self._layered = False  # whether blocks of single layers were asked for
        what = f"a product of {type(self).__name__}"
        words = self._evaluation.within_memory(lambda: prepare(self), what)
        self.engine = words + source.note

    @exclusive
    def _multiply(self, requests: Sequence[Request]) -> None:
        """Products with this matrix or with blocks of it, in one pass over the data.

        Raises:
            MemoryError: a product does not fit; what it needs and which option would help.
        """
        if not self._layered and any(map(self._is_one_layer, requests)):
            self._kept.forget()  # graphs are built anew, with the factors of single layers
            self._layered = True
        self._evaluation.within_memory(lambda: self._sum_over_parts(requests))
        if self._options.weight_decay:
            for request in requests:
                request.out.add_(request.V.detach(), alpha=self._options.weight_decay)

    def _sum_over_parts(self, requests: Sequence[Request]) -> None:
        """Write the products without weight decay: each graph adds the share of its part."""
        kept, deferred = self._kept, all(request.deferred for request in requests)
        evaluates = not kept.complete
        with self._evaluation.conditions(deferred=deferred, evaluates=evaluates) as params:
            if kept.complete:  # the data need not be read
                for i, graph in enumerate(kept.graphs):
                    graph.products(requests, first=i == 0, keep=True)
                return
            try:
                with closing(self._loss.parts()) as parts:
                    for i, part in enumerate(parts):
                        graph = self._kept_or_new_graph(i, part, params)
                        graph.products(requests, first=i == 0, keep=i < kept.capacity)
                kept.complete = kept.capacity > i
            except BaseException:
                kept.forget()
                raise

    def _kept_or_new_graph(self, i: int, part: Part, params: list[Tensor]) -> Graph:
        """The graph of the i-th part; a new one is kept if the capacity allows it."""
        if i < len(self._kept.graphs):
            return self._kept.graphs[i]
        graph = self._new_graph(part, params)
        if i < self._kept.capacity:
            self._keep(graph, part, params)
        return graph

    def _new_graph(self, part: Part, params: list[Tensor]) -> Graph:
        """The graph of a part, which knows the rows that have no gradient."""
        graph, findings = self._graph(part, params), self._evaluation.findings
        graph.padded = {place: row for place, row, tied in findings.padding if not tied}
        if findings.unreached and not self._options.keeps_graphs:
            # forward mode and differences also move the parameters of detached layers
            idle = unused(self._evaluation.value(part), params, findings.unreached)
            graph.padded |= dict.fromkeys(idle, slice(None))
        return graph

    def _keep(self, graph: Graph, part: Part, params: list[Tensor]) -> None:
        """Keep a graph, and the factors of single layers where they are wanted and fit."""
        model = self._loss.model
        if self._layered and self._options.precision != "bf16" and model is not None:
            # the factors need a second graph of the outputs
            needs = 2 * self._evaluation.findings.graph_bytes
            room = (self._options.room(self.device) - needs) / self._loss.count
            try:
                graph.layers = self._layers(model, part, params, room)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
        self._kept.graphs.append(graph)

    def _is_one_layer(self, request: Request) -> bool:
        """Whether products are wanted with a block of the parameters of a single layer."""
        if request.operator is self:
            return False
        return len({self.layout.names[place].rpartition(".")[0] for place in request.places}) == 1

    @property
    def _options(self) -> Options:
        return self._evaluation.options

    # What a subclass defines.

    def _graph(self, part: Part, params: list[Tensor]) -> Graph:
        """The graph of a part."""
        raise NotImplementedError

    def _layers(
        self, model: nn.Module, part: Part, params: list[Tensor], room: float
    ) -> Layers | None:
        """The factors of single layers, within ``room`` bytes; see ``layer_factors``."""
        raise NotImplementedError

    def _distances(self, part: Part, v: Tensor) -> tuple[float, float]:
        """How far a product of the part with v (1, n) is from differences; see ``distances``."""
        raise NotImplementedError

    def _differentiated(self, outputs: Any, loss: Tensor) -> Tensor:
        """The scalar whose gradient is differentiated for a product."""
        return loss

    def _unchecked_nodes(self, outputs: Any, loss: Tensor) -> list[str]:
        """Names of nodes that products differentiate twice and that no check has seen."""
        if not self._evaluation.twice:
            return []
        return self._evaluation.functions.unchecked(loss, self._options.engine == "forward")

    # What the algorithms use; see ``SymmetricOperator``.

    def _relative_error(self) -> float:
        return self._evaluation.relative_error()

    def _capture_obstacle(self) -> str | None:
        if not self._kept.every_part:
            return "the graphs of some batches are built at each product"
        if self._evaluation.functions.words():
            return "central differences of custom functions wait for the device"
        return None

    # What the user sees.

    def blocks(
        self, by: str | re.Pattern[str] | Mapping[str, str] | Callable[[str], str | None]
    ) -> dict[str, Block]:
        """The diagonal blocks of the matrix as operators by name.

        ``fh.eigsh``, ``fh.trace`` and ``fh.density`` take the dictionary, advance all blocks
        together, one pass over the data per round, and return a dictionary. For blocks of single
        layers the derivative of the outputs with respect to each layer's output is kept where
        ``memory_budget`` allows: it has the size of the activations times the number of classes.

        Args:
            by: how parameters are grouped. ``"layer"``: by the module that owns them; ``"stage"``:
                by the model's children, or the entries of a ModuleList; a regular expression
                searched in the names, whose first group, or else whole match, names the block; a
                mapping of block names to such expressions; a callable of a parameter's name that
                returns its block or None. Parameters without a block are left out.

        Raises:
            ValueError: no parameter matches, or two patterns match the same one.
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
        """The parameters as they are now, one vector (n,)."""
        named = self._loss.named_parameters()
        return self.flatten([real(named[k].detach()).to(self.dtype) for k in self.layout.names])

    @exclusive
    def gradient(self, offset: Tensor | None = None) -> Tensor:
        """The gradient (n,) of the loss at theta, or at theta + ``offset`` (n,).

        Raises:
            MemoryError: it does not fit; what it needs and which option would help.
        """
        if offset is not None:
            self._accepts("offset", offset, (1,))
        evaluation, decay, parts = self._evaluation, self._options.weight_decay, self._loss.parts
        pack_ = kernels.select(self.device).pack_

        def made() -> Tensor:
            out = torch.zeros(self.n, dtype=self.dtype, device=self.device)
            with (
                evaluation.conditions() as params,
                evaluation.moved(params, offset),
                closing(parts()) as every,
            ):
                for part in every:
                    pieces = gradient(evaluation.value(part), params)
                    pack_(
                        out, [real(p).to(self.dtype) for p in pieces], alpha=part.weight, beta=1.0
                    )
                return out.add_(self.theta(), alpha=decay) if decay else out

        return evaluation.within_memory(made, "the gradient")

    @exclusive
    def loss(self, offset: Tensor | None = None) -> float:
        """The loss at theta, or at theta + ``offset`` (n,), summed over the data in float64.

        The parameters are replaced during the call, not written. The value may be infinite or NaN
        far from theta.

        Raises:
            MemoryError: as of ``gradient``.
        """
        if offset is not None:
            self._accepts("offset", offset, (1,))
        evaluation, decay, parts = self._evaluation, self._options.weight_decay, self._loss.parts

        def summed() -> float:
            total = 0.0
            with (
                evaluation.conditions(curved=False) as params,
                evaluation.moved(params, offset),
                closing(parts()) as every,
            ):
                for part in every:
                    total += part.weight * float(self._loss.evaluate(part)[1].detach())
                if decay:
                    squares = sum(float(real(p.detach()).double().square().sum()) for p in params)
                    total += decay / 2 * squares
            return total

        return evaluation.within_memory(summed, "the loss")

    @exclusive
    def check(self) -> Check:
        """Measure what could silently be wrong with this model, these data and this engine.

        * symmetry: of the matrix.
        * repetition: whether a product repeats.
        * gradient: against central differences of the loss along random signs.
        * difference: a product of the Hessian against central differences of gradients, or against
          forward mode where kinks, as of ReLU, spoil those.
        * weights: whether the gradient of each batch is that of its halves.

        A row that does not apply says why: a loss that is computed in 16 bits has no differences,
        and half of a batch may be no batch of this model (graphs, time in the first dimension).
        Parameters that no gradient reaches are named. The check costs three products, nine
        gradients, and five evaluations of the loss, or thirteen where five do not suffice.
        ``print(A.check())`` shows one line per row.

        Returns:
            Check: the numbers, ``ok``, and the report.
        """
        return check(self, self._exact)

    def flatten(self, tensors: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
        """A vector (n,) from tensors by parameter name, or in the order of the parameters.

        Those of complex parameters may be complex, or real as of ``unflatten``.
        """
        return self.layout.flatten(tensors)

    def unflatten(self, v: Tensor) -> dict[str, Tensor]:
        """Views of v (n,) by parameter name, in the parameters' shapes.

        That of a complex parameter is real with a last dimension of 2, as of ``view_as_real``.
        """
        return self.layout.unflatten(v)
