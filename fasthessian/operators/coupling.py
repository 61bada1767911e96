"""Whether batches are what their parts make up, as far as the gradient of the loss tells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing

import torch
from torch import Tensor

from fasthessian.operators.batches import Batch
from fasthessian.operators.losses import ModelLoss


def coupling(loss: ModelLoss, params: Sequence[Tensor], allowed: float) -> tuple[float, int]:
    """Relative change of a batch's gradient when it is cut into microbatches, or in two.

    Costs two gradients of every batch. Where the change is more than ``allowed``, it is measured
    once more at parameters a little off, because near a minimum gradients are rounding alone.

    Returns:
        The largest over the batches that can be cut, and its index; NaN if there is none.
    """
    largest = (math.nan, -1)
    with closing(loss.batches()) as batches:
        for index, batch, chunks in batches:
            change = _change(loss, batch, chunks, params, moved=False)
            if not change <= allowed:
                change = min(change, _change(loss, batch, chunks, params, moved=True))
            if not change <= largest[0]:
                largest = change, index
    return largest


def _change(
    loss: ModelLoss, batch: Batch, chunks: Sequence[Batch], params: Sequence[Tensor], moved: bool
) -> float:
    """How far the gradient of a batch is from what its chunks make up."""
    whole, found = loss.gradient(batch, params, moved)
    terms = loss.terms
    if not terms.number(batch, found):
        return 0.0
    counts, total, size = terms.told(batch, chunks), 0.0, 0.0
    together = [torch.zeros_like(piece) for piece in whole]
    for place, chunk in enumerate(chunks):
        pieces, found = loss.gradient(chunk, params, moved)
        count = counts[place] if counts else terms.number(chunk, found)
        if count:  # the mean over no term is NaN
            total += count
            size += count * _norm(pieces)
            torch._foreach_add_(together, list(pieces), alpha=count)
    total = 1.0 if terms.summed else total or 1.0
    gap = _norm([a - b / total for a, b in zip(whole, together, strict=True)])
    return gap / (size / total or 1.0)


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))
