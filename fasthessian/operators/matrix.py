"""The interface of a curvature matrix that the examination and the self-checks use."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from fasthessian.operators.evaluation import Evaluation
from fasthessian.operators.loss.part import Part
from fasthessian.operators.products.engines import Graph
from fasthessian.operators.shares import Shares


class Matrix(Protocol):
    """The members of ``Curvature`` that ``examination`` and ``checks`` use."""

    n: int
    dtype: torch.dtype
    device: torch.device
    matvecs: int
    _evaluation: Evaluation
    _shares: Shares

    def __matmul__(self, v: Tensor) -> Tensor:
        """The product with v (n,)."""

    def theta(self) -> Tensor:
        """The parameters (n,)."""

    def gradient(self, offset: Tensor | None = None) -> Tensor:
        """The gradient (n,) of the loss at theta + ``offset``."""

    def loss(self, offset: Tensor | None = None) -> float:
        """The loss at theta + ``offset``."""

    def flatten(self, tensors: Any) -> Tensor:
        """A vector (n,) from tensors."""

    def _new_graph(self, part: Part, params: list[Tensor]) -> Graph:
        """The graph of a part."""

    def _keep(self, graph: Graph, part: Part, params: list[Tensor]) -> None:
        """Keep the graph of a part."""

    def _differentiated(self, outputs: Any, loss: Tensor) -> Tensor:
        """The scalar whose gradient is differentiated for a product."""

    def _unchecked_nodes(self, outputs: Any, loss: Tensor) -> list[str]:
        """Names of unchecked nodes that products differentiate twice."""

    def _distances(self, part: Part, v: Tensor) -> tuple[float, float]:
        """How far the part's product with v (1, n) is from differences; see ``distances``."""
