"""An operator on vectors that are split over ranks, each of which holds a slice of every vector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fasthessian.distributed.ranks import Ranks
from fasthessian.distributed.slices import Slice
from fasthessian.operators.base import SymmetricOperator, finite
from fasthessian.operators.blocks import Block
from fasthessian.operators.curvature import Curvature
from fasthessian.operators.request import Request


class Sliced(SymmetricOperator):
    """A matrix, or a block of it, whose products take and return the slices of this rank.

    A product gathers the vector from all ranks, multiplies it with the data of this rank, and
    reduces the products so that each rank gets its slice of their sum: two collectives that move
    as much as the one of a product with whole vectors. This rank holds one gathered vector and one
    product of length n.

    Args:
        A: the matrix or block, whose data are divided over the same ranks.
    """

    def __init__(self, A: Curvature | Block) -> None:
        self._set_size(A.n, A.dtype, A.device)
        self._whole, self._curvature = A, _curvature(A)
        self._kept = A._kept
        self.slice = Slice.of(A.n, self._curvature._ranks)
        self._buffers: tuple[Tensor, Tensor] | None = None

    def _agree(self, call: Mapping[str, str] | None = None) -> None:
        self._curvature._agree(call)

    @property
    def _probes(self) -> Ranks:
        return self._curvature._probes

    def gather(self, rows: Tensor) -> Tensor:
        """See ``SymmetricOperator.gather``."""
        return self._whole.gather(rows)

    def _relative_error(self) -> float:
        return self._whole._relative_error()

    def _capture_obstacle(self) -> str | None:
        return "vectors are split over ranks, and collectives are not captured"

    def _multiply(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._multiply_one(request)
            self._whole.matvecs += len(request.V)

    def _multiply_one(self, request: Request) -> None:
        b, (n, width, _, _, ranks) = len(request.V), self.slice
        vectors, products = self._buffers_for(b)
        ranks.gather_(vectors, request.V.contiguous())
        if b > 1:  # from (ranks, b, width) to (b, ranks * width)
            vectors = vectors.view(ranks.size, b, width).transpose(0, 1).reshape(-1)
        whole = Request(
            self._whole,
            vectors.view(b, -1)[:, :n],
            products.view(b, -1)[:, :n],
            request.deferred,
        )

        def reduce() -> None:
            pieces = products
            if b > 1:
                pieces = products.view(b, ranks.size, width).transpose(0, 1).reshape(-1)
            out = request.out if request.out.is_contiguous() else torch.empty_like(request.V)
            ranks.scatter_(out, pieces)
            if out is not request.out:
                request.out.copy_(out)

        gathered = self._curvature._options.gathered
        with gathered.open(), ranks.failing([products], reduce, request.deferred):
            self._curvature._multiply_here([whole])
        reduce()
        if not request.deferred and not finite(request.out):
            ranks.check()
        if decay := self._curvature._options.weight_decay:
            request.out.add_(request.V, alpha=decay)

    def _buffers_for(self, b: int) -> tuple[Tensor, Tensor]:
        """The gathered vectors and their products, flat; those of one vector are kept."""
        if b == 1 and self._buffers is not None:
            return self._buffers
        count = b * self.slice.ranks.size * self.slice.width
        made = (
            torch.empty(count, dtype=self.dtype, device=self.device),
            torch.zeros(count, dtype=self.dtype, device=self.device),  # padding stays 0
        )
        if b == 1:
            self._buffers = made
        return made


def _curvature(A: Curvature | Block) -> Curvature:
    matrix = A._matrix
    assert isinstance(matrix, Curvature)
    return matrix
