"""Rows of embeddings without gradient (``padding_idx``), found in the graph of the loss.

torch omits such a row only from first derivatives. Tangents are set to 0 there, so that its row and
column of the matrix are 0. A row may also be used elsewhere, in a tied output layer or a computed
weight, and get a gradient from there. Then only double backward gives torch's derivative.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fasthessian.errors import InputError
from fasthessian.operators.products.engines import nodes_from


class Padding(NamedTuple):
    """A padding row of the parameter at ``place``, and whether it is also used elsewhere."""

    place: int
    row: int
    tied: bool


def padding(loss: Tensor, params: Sequence[Tensor]) -> Iterator[Padding]:
    """The padding rows of the parameters in the graph of the loss."""
    place = {id(p): i for i, p in enumerate(params)}
    # for the node of each weight, the rows that its readers omit
    rows: defaultdict[Any, set[int | None]] = defaultdict(set)
    for node in nodes_from([loss.grad_fn]):
        for i, (source, _) in enumerate(node.next_functions):
            if source is not None:
                rows[source].add(_row(node) if i == 0 else None)
    for source, read in rows.items():
        for row in read - {None}:
            for at in {place[id(p)] for p in _leaves(source) if id(p) in place}:
                computed = not hasattr(source, "variable")
                yield Padding(at, row or 0, computed or len(read) > 1)


def check_untied(found: Sequence[Padding], names: Sequence[str], engine: str) -> None:
    """Raise ValueError if a row is used elsewhere, because an engine without graphs is wrong."""
    for place, row, tied in found:
        if tied:
            name = names[place].removesuffix(".weight")
            raise InputError(
                f"engine must be 'retained' or 'recompute' for this loss, got {engine!r}: "
                f"{name!r} is tied, and its row padding_idx={row} has a gradient from one of its "
                f"places only"
            )


def _row(node: Any) -> int | None:
    """The row that an embedding omits from the gradient; None for any other node."""
    if not node.name().startswith("Embedding"):
        return None
    if node._saved_sparse:
        raise InputError(
            "the loss uses an embedding with sparse gradients, which have no second derivative; "
            "set its sparse to False"
        )
    row, count = node._saved_padding_idx, node._saved_weight_sym_argsize_0
    return row if row < count else None  # without a padding row it is 2^64 - 1


def _leaves(source: Any) -> Iterator[Tensor]:
    """The leaf tensors that a node depends on."""
    for node in nodes_from([source]):
        if hasattr(node, "variable"):
            yield node.variable
