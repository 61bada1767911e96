"""The request for products: an algorithm sends it to the graphs of the loss."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor


class Batches(NamedTuple):
    """How the loss of an operator is divided into batches, or microbatches."""

    before: int = 0  # on the ranks before this one
    here: int = 1  # on this rank
    total: int = 1  # on all ranks
    weight_decay: float = 0.0  # times the identity: the part of the matrix that no batch has


class EachPart(Protocol):
    """Gives each part of the loss a vector of its own, and takes the product of each part.

    Attributes:
        product: (1, n), where the product of a part is written, times the weight of the part.
        sums: float64 numbers that are summed over the ranks after the pass.
    """

    product: Tensor
    sums: Tensor

    def begin(self) -> None:
        """Write the vector of the next part into the V of the request."""

    def end(self, weight: float) -> None:
        """Take the product of this part: add to the ``out`` of the request and to ``sums``."""


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A request to multiply the rows of V (b, n) by the operator, into the rows of ``out`` (b, n).

    An algorithm yields it, ``multiply`` answers it, and the graph of each part of the loss adds its
    products to ``out``. Each row must be contiguous; the distance between rows is free. V and
    ``out`` must not overlap.

    If the request is ``deferred``, nothing is read back from a GPU. The caller must then check for
    NaN and Inf, and changes of parameters are found only if they change autograd's version counter.

    With ``each_part``, V has one row, each part has its own vector, and ``out`` is the sum of what
    ``each_part`` makes of the products. Weight decay is left out.
    """

    operator: Any  # a SymmetricOperator
    V: Tensor  # (b, n)
    out: Tensor  # (b, n)
    deferred: bool = False
    each_part: EachPart | None = None

    @property
    def places(self) -> Sequence[int]:
        """Positions of the operator's parameters among those of the graphs."""
        places: Sequence[int] = self.operator._places
        return places

    @functools.cached_property
    def pieces(self) -> list[list[Tensor]]:
        """The rows of V, split by parameter, in the parameters' shapes. All graphs share them."""
        return [self.operator.layout.views(v) for v in self.V.detach()]
