"""Whether a batch may be cut: whether its gradient is the weighted mean of its parts' gradients.

It is not if the samples of a batch are coupled, as by batch statistics or by a loss of pairs. Then
microbatches would change the loss. The check costs two gradients of every batch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from fasthessian.errors import InputError
from fasthessian.memory import out_of_memory
from fasthessian.operators.loss.batches import Batch, cut, halves, items, samples
from fasthessian.operators.loss.part import REPEATED
from fasthessian.operators.loss.terms import Terms

ATOMS = (str, bytes, bool, int, float, complex, type(None))


class Batched(Protocol):
    """A loss over batches; see ``ModelLoss``."""

    model: nn.Module
    microbatch: int | None
    terms: Terms

    def count_terms(self, params: Sequence[Tensor], allowed: float) -> None:
        """Count the terms of each part by the loss itself."""

    def batches(self) -> Generator[tuple[int, Batch], None, None]:
        """(index, batch) of those that have a weight."""

    def gradient(
        self, batch: Batch, params: Sequence[Tensor], moved: bool = False
    ) -> tuple[Sequence[Tensor], list[float]]:
        """The gradient of the loss of a batch, and its denominators."""

    def loss_in_any_mode(self, place: int, batch: Batch) -> Tensor:
        """The loss of a batch whose random numbers are drawn for this place in a pass."""


def _varies(loss: Batched, batch: Batch) -> bool:
    """Whether the loss of a batch depends on random numbers that it draws."""
    with torch.no_grad():
        first, other = (float(loss.loss_in_any_mode(place, batch)) for place in (0, 1))
    return abs(first - other) > REPEATED * abs(first)


class Coupling(NamedTuple):
    """What ``coupling`` found."""

    change: float  # the largest relative change over the batches; NaN if none could be cut
    batch: int  # the index of that batch
    reason: str  # why a batch could not be cut; empty if all could


def coupling(loss: Batched, params: Sequence[Tensor], allowed: float) -> Coupling:
    """How much a batch's gradient changes if the batch is cut into microbatches, or in two.

    A change of more than ``allowed`` is measured again at parameters that are moved a little, since
    gradients near a minimum are nothing but rounding errors.

    Without ``microbatch`` the batches are not cut in products. Then it is no error if half of a
    batch is not a batch of this model. Such a batch is cut along the second dimension, where data
    with time first have their samples. If that shows nothing either, the reason is given.
    """
    if not callable(loss.terms.given):
        with contextlib.suppress(ValueError):  # weights were given since none are right
            loss.count_terms(params, allowed)
    largest, index_of_largest, why = math.nan, -1, ""
    with closing(loss.batches()) as batches:
        for index, batch in batches:
            if loss.microbatch:
                change, reason = _of_microbatches(loss, index, batch, params, allowed)
            else:
                change, reason = _of_halves(loss, batch, params, allowed)
            why = why or reason
            if change > largest or math.isnan(largest):
                largest, index_of_largest = change, index
    return Coupling(largest, index_of_largest, why)


def _of_microbatches(
    loss: Batched, index: int, batch: Batch, params: Sequence[Tensor], allowed: float
) -> tuple[float, str]:
    """The change of a batch, or of as much of it as fits in memory; or NaN and the reason."""
    most, whole = loss.microbatch, batch
    while True:
        try:
            change, reason = _change_of_cut(loss, batch, cut(batch, most), params, allowed)
            break
        except RuntimeError as error:
            if not (out_of_memory(error) and most and samples(batch) > most):
                raise
        batch = next(halves(batch))  # not in the handler: its traceback keeps memory allocated
    if reason:
        raise InputError(
            f"microbatch={most} does not serve, a part of batch {index} is no batch of this model: "
            f"{reason}; use microbatch=None"
        )
    if math.isnan(change) and batch is not whole:
        return change, f"more than microbatch={most} does not fit, so samples may couple unseen"
    return change, ""


def _of_halves(
    loss: Batched, batch: Batch, params: Sequence[Tensor], allowed: float
) -> tuple[float, str]:
    """The change of a batch that is cut in two; or NaN and why it shows nothing."""
    if samples(batch) < 2:
        return math.nan, "a batch of one sample cannot be cut"
    change, reason = _change_of_cut(loss, batch, halves(batch), params, allowed)
    if change <= allowed:
        return change, ""
    if not reason and _varies(loss, batch):
        reason = "the loss draws random numbers, others for each part"
    reason = reason or _not_samples(loss, batch)
    across, _ = _change_of_cut(loss, batch, halves(batch, dim=1), params, allowed)
    if across <= allowed:
        if reason:
            return across, ""
        reason = "halves along the second dimension make up the batch, along the first they do not"
    return (math.nan, reason) if reason else (change, "")


def _not_samples(loss: Batched, batch: Batch) -> str:
    """Why halves of a batch may not be halves of its samples; empty if there is no such reason."""
    count = samples(batch)
    for item in items(batch):
        shape = tuple(item.shape) if isinstance(item, Tensor) else None
        if shape is None and not isinstance(item, ATOMS):
            return f"data holds a {type(item).__name__}, which is not cut with the samples"
        if shape and shape[0] not in (1, count):
            return f"data holds a tensor of shape {shape}, which is not cut with {count} samples"
    for name, module in loss.model.named_modules():
        if getattr(module, "batch_first", None) is False:
            return f"{name or 'the model'} has batch_first=False, its first dimension may be time"
    return ""


def _change_of_cut(
    loss: Batched,
    batch: Batch,
    chunks: Iterable[Batch],
    params: Sequence[Tensor],
    allowed: float,
) -> tuple[float, str]:
    """The smaller change of a batch here and at moved parameters; or NaN and the reason."""
    whole = loss.gradient(batch, params, False)
    try:
        parts = list(chunks)
        if len(parts) < 2:
            return math.nan, ""
        change = _change(loss, batch, whole, parts, params, moved=False)
        if not change <= allowed:
            whole = loss.gradient(batch, params, True)
            change = min(change, _change(loss, batch, whole, parts, params, moved=True))
        return change, ""
    except Exception as error:  # whatever a model raises for half of its batch
        if out_of_memory(error):
            raise
        cause = error.__cause__ or error
        return math.nan, f"{cause}".strip().partition("\n")[0] or type(cause).__name__


def _change(
    loss: Batched,
    batch: Batch,
    whole: tuple[Sequence[Tensor], Any],
    chunks: Sequence[Batch],
    params: Sequence[Tensor],
    moved: bool,
) -> float:
    """How far the gradient of a batch is from the weighted mean of its chunks' gradients."""
    terms = loss.terms
    if not terms.number(batch, whole[1]):
        return 0.0
    counts, total, size = terms.given_numbers(batch, chunks), 0.0, 0.0
    sums = [torch.zeros_like(piece) for piece in whole[0]]
    for place, chunk in enumerate(chunks):
        pieces, found = loss.gradient(chunk, params, moved)
        count = counts[place] if counts else terms.number(chunk, found)
        if count:  # the mean over no term is NaN
            total += count
            size += count * _norm(pieces)
            torch._foreach_add_(sums, list(pieces), alpha=count)
    total = 1.0 if terms.summed else total or 1.0
    gap = _norm([a - b / total for a, b in zip(whole[0], sums, strict=True)])
    return gap / (size / total or 1.0)


def _norm(tensors: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(t.double().square().sum()) for t in tensors))
