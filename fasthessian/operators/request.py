"""The request for products: what passes from an algorithm to the graphs of the loss."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """Products wanted: of the rows of V (b, n) by the operator, into the rows of ``out`` (b, n).

    An algorithm yields it, ``multiply`` answers it, and the graph of each part of the loss adds its
    share to ``out``. The rows may be strided views but are contiguous each. V and ``out`` must not
    overlap.

    If the request is ``deferred``, nothing is read back from a GPU: the caller looks for NaN and
    Inf, and changes of parameters that leave no trace in autograd's versions go unnoticed.
    """

    operator: Any  # a SymmetricOperator
    V: Tensor  # (b, n)
    out: Tensor  # (b, n)
    deferred: bool = False

    @property
    def places(self) -> Sequence[int]:
        """Places of the operator's parameters among those of the graphs."""
        places: Sequence[int] = self.operator._places
        return places

    @functools.cached_property
    def pieces(self) -> list[list[Tensor]]:
        """The rows of V by parameter, in the parameters' shapes; made once, for all graphs."""
        return [self.operator.layout.views(v) for v in self.V.detach()]
