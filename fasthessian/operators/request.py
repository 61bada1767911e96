"""The request for products: an algorithm sends it to the graphs of the loss."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A request to multiply the rows of V (b, n) by the operator, into the rows of ``out`` (b, n).

    An algorithm yields it, ``multiply`` answers it, and the graph of each part of the loss adds its
    products to ``out``. Each row must be contiguous; the distance between rows is free. V and
    ``out`` must not overlap.

    If the request is ``deferred``, nothing is read back from a GPU. The caller must then check for
    NaN and Inf, and changes of parameters are found only if they change autograd's version counter.
    """

    operator: Any  # a SymmetricOperator
    V: Tensor  # (b, n)
    out: Tensor  # (b, n)
    deferred: bool = False

    @property
    def places(self) -> Sequence[int]:
        """Positions of the operator's parameters among those of the graphs."""
        places: Sequence[int] = self.operator._places
        return places

    @functools.cached_property
    def pieces(self) -> list[list[Tensor]]:
        """The rows of V, split by parameter, in the parameters' shapes. All graphs share them."""
        return [self.operator.layout.views(v) for v in self.V.detach()]
