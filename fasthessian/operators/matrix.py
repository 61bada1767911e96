"""The interface of a curvature matrix to the examination, the self-checks and the landscape."""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor

from fasthessian.errors import InputTypeError
from fasthessian.operators.base import SymmetricOperator
from fasthessian.operators.evaluation import Evaluation
from fasthessian.operators.loss.part import Part
from fasthessian.operators.products.engines import Graph
from fasthessian.operators.shares import Shares
from fasthessian.vectors import Layout


class Matrix(Protocol):
    """The members of ``Curvature`` that are used where that class cannot be imported."""

    n: int
    dtype: torch.dtype
    device: torch.device
    layout: Layout
    matvecs: int
    _evaluation: Evaluation
    _shares: Shares

    def __matmul__(self, v: Tensor) -> Tensor:
        """The product with v (n,)."""

    def losses(self, offsets: Tensor) -> Tensor:
        """The losses (b,) at theta + each row of ``offsets`` (b, n)."""

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


def with_loss(A: Any) -> Matrix:
    """Return ``A`` if it is the matrix of a loss; otherwise raise a TypeError."""
    if not isinstance(A, SymmetricOperator) or not hasattr(A, "losses"):
        raise InputTypeError(
            f"A must know its loss, got {type(A).__name__}; "
            "make one with fh.Hessian(model, criterion, data)"
        )
    return cast("Matrix", A)
