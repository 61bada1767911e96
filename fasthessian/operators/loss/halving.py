"""Batches cut in two: which weights of the halves' gradients make up that of the whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fasthessian.memory import out_of_memory
from fasthessian.operators.loss.batches import Batch, halves, mapped, samples

TRIALS = 3  # batches that are cut in two at most
SAME = 1e-6  # relative; a denominator in float32 against a number of entries
SHARP = {torch.float64: 1e-5, torch.float32: 1e-4}  # some losses are float32 in every model
SUM = "sum"
SAMPLES = "samples"
Key = int | str  # of a way to count: a summand of the loss by its denominator; words; SUM
Numbers = dict[Key, float]
Gradient = tuple[Sequence[Tensor], Numbers]  # of a batch, with its numbers of terms


class HalvingTrials:
    """The trials made, and how well each way to count terms explains their gradients.

    Args:
        gradient: of the loss of a batch; at parameters a little off where the flag is set.
        sharp: relative miss that rounding makes.
        allowed: relative miss that is accepted.
    """

    def __init__(
        self, gradient: Callable[[Batch, bool], Gradient], sharp: float, allowed: float
    ) -> None:
        self._gradient, self.sharp, self._allowed = gradient, sharp, allowed
        self._left, self._idle = TRIALS, TRIALS
        self._first: Numbers = {}
        self.fits: Numbers = {}  # the largest relative miss of each way to count

    def consider(self, batch: Batch, values: Numbers) -> None:
        """Cut the batch in two, if it can tell more than those before it."""
        if not (self._left and self._idle):
            return
        if self.fits:
            kept = [key for key in self.survivors() if key in values]
            ratios = [values[key] / (self._first[key] or math.nan) for key in kept]
            if not ratios or max(ratios) - min(ratios) <= SAME * abs(ratios[0]):
                return
        try:
            found = self._misses(batch)
        except Exception as error:  # whatever a model raises at half of its batch
            if out_of_memory(error) and samples(batch) > 1:  # one sample was doubled
                raise
            self._idle -= 1
            return
        if _says_nothing(self._surviving(found)):
            self._idle -= 1
            return
        self._left -= 1
        if self.fits:
            self.fits = {key: max(self.fits[key], found[key]) for key in self.fits if key in found}
        else:
            self._first, self.fits = values, found

    def survivors(self) -> list[Key]:
        """The ways to count that explain the gradients to rounding, or else nearly."""
        return self._surviving(self.fits)

    def _surviving(self, fits: Numbers) -> list[Key]:
        best = min(fits.values(), default=math.inf)
        most = min(self._allowed, max(10 * best, self.sharp))
        return [key for key, each in fits.items() if each <= most]

    def _misses(self, batch: Batch) -> Numbers:
        found = self._made(batch, moved=False)
        left = self._surviving(found)
        if not left or _says_nothing(left):  # as where the gradient is 0
            moved = self._made(batch, moved=True)
            found = moved if self._surviving(moved) else found
        return found

    def _made(self, batch: Batch, moved: bool) -> Numbers:
        count = samples(batch)
        pieces = list(halves(batch)) if count > 1 else [batch, batch]
        whole = batch if count > 1 else twice(batch)
        gradients, numbers = zip(
            *(self._gradient(each, moved) for each in (whole, *pieces)), strict=True
        )
        gram = inner_products(gradients)
        misses: Numbers = {}
        for key, total in numbers[0].items():
            if total > 0 and all(key in each for each in numbers):
                shares = [each[key] / total for each in numbers[1:]]
                misses[key] = miss(gram, shares)
        return {key: each for key, each in misses.items() if math.isfinite(each)}


def _says_nothing(left: Sequence[Key]) -> bool:
    """Whether a sum and a mean explain the gradients alike: there are none."""
    return SUM in left and SAMPLES in left


def twice(batch: Batch) -> Batch:
    """The batch with each of its samples a second time."""
    count = samples(batch)

    def doubled(item: Any) -> Any:
        long = isinstance(item, Tensor) and item.dim() > 0 and len(item) == count
        return torch.cat([item, item]) if long else item

    return mapped(batch, doubled)


def inner_products(gradients: Sequence[Sequence[Tensor]]) -> Tensor:
    """g_i'g_j in float64."""
    total = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for pieces in zip(*gradients, strict=True):
        rows = torch.stack([piece.flatten() for piece in pieces]).double()
        total += (rows @ rows.T).cpu()
    return total


def miss(gram: Tensor, shares: Sequence[float]) -> float:
    """|g_0 - sum_i shares_i g_i| over sum_i shares_i |g_i|, from the inner products."""
    weights = torch.tensor([1.0, *(-share for share in shares)], dtype=torch.float64)
    used = weights != 0  # the mean over no term at all is NaN
    gram, weights = gram[used][:, used], weights[used]
    square = float(weights @ gram @ weights)
    size = float(weights[1:].abs() @ gram.diagonal()[1:].clamp(min=0).sqrt())
    size = size or float(gram[0, 0].clamp(min=0).sqrt())
    if math.isnan(square):
        return math.nan
    return math.sqrt(max(square, 0.0)) / size if size else 0.0
