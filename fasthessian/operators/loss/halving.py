"""Trials on batches that are cut in two: which way to count terms explains the gradients.

If g is the gradient of a batch with n terms, and g1 and g2 are those of its halves with n1 and n2
terms, then g = (n1 g1 + n2 g2) / n for a mean. For a sum g = g1 + g2. Only the right numbers
satisfy this to rounding. A candidate, such as "valid entries of the targets", that misses g in one
trial is excluded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fasthessian.memory import out_of_memory
from fasthessian.operators.loss.batches import Batch, halves, mapped, samples

TRIALS = 3  # batches that are cut in two at most
SAME = 1e-6  # relative; a denominator in float32 is compared with a number of entries
# Relative miss that rounding makes; some losses are computed in float32 in every model.
ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-4}
SUM = "sum"
SAMPLES = "samples"
Key = int | str  # a way to count: the place of a denominator, or the name of a counter, or SUM
Numbers = dict[Key, float]  # numbers of terms, or misses, by way to count
Gradient = tuple[Sequence[Tensor], Numbers]  # of the loss of a batch, with its numbers of terms


class HalvingTrials:
    """The trials so far, and how well each way to count terms explains their gradients.

    Args:
        gradient: returns the gradient of the loss of a batch; if the flag is set, at parameters
            that are moved a little.
        rounding: relative miss that rounding makes.
        allowed: relative miss that is accepted.
    """

    def __init__(
        self, gradient: Callable[[Batch, bool], Gradient], rounding: float, allowed: float
    ) -> None:
        self._gradient, self.rounding, self._allowed = gradient, rounding, allowed
        self._trials_left, self._failures_left = TRIALS, TRIALS
        self._first: Numbers = {}  # the numbers of terms of the first batch that was cut
        self.misses: Numbers = {}  # the largest relative miss of each way to count

    def consider(self, batch: Batch, values: Numbers) -> None:
        """Make a trial, if this batch can exclude a way to count; ``values`` are its numbers."""
        if not (self._trials_left and self._failures_left):
            return
        if self.misses:
            kept = [key for key in self.survivors() if key in values]
            ratios = [values[key] / (self._first[key] or math.nan) for key in kept]
            if not ratios or max(ratios) - min(ratios) <= SAME * abs(ratios[0]):
                return
        try:
            found = self._trial(batch)
        except Exception as error:  # whatever a model raises for half of its batch
            if out_of_memory(error) and samples(batch) > 1:  # a single sample was doubled
                raise
            self._failures_left -= 1
            return
        if _undecided(self._surviving(found)):
            self._failures_left -= 1
            return
        self._trials_left -= 1
        if self.misses:
            both = [key for key in self.misses if key in found]
            self.misses = {key: max(self.misses[key], found[key]) for key in both}
        else:
            self._first, self.misses = values, found

    def survivors(self) -> list[Key]:
        """The ways to count that explain the gradients to rounding, or if none does, nearly."""
        return self._surviving(self.misses)

    def _surviving(self, misses: Numbers) -> list[Key]:
        best = min(misses.values(), default=math.inf)
        most = min(self._allowed, max(10 * best, self.rounding))
        return [key for key, each in misses.items() if each <= most]

    def _trial(self, batch: Batch) -> Numbers:
        """The misses for a batch, here or, if these decide nothing, at moved parameters."""
        found = self._misses(batch, moved=False)
        left = self._surviving(found)
        if not left or _undecided(left):  # for example the gradient is 0
            moved = self._misses(batch, moved=True)
            found = moved if self._surviving(moved) else found
        return found

    def _misses(self, batch: Batch, moved: bool) -> Numbers:
        """How far each way to count misses the gradient of a batch, from those of its halves.

        A single sample cannot be cut: it is compared with a batch that has it twice.
        """
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


def _undecided(left: Sequence[Key]) -> bool:
    """Whether both a sum and a mean explain the gradients: these are 0."""
    return SUM in left and SAMPLES in left


def twice(batch: Batch) -> Batch:
    """The batch with all of its samples twice."""
    count = samples(batch)

    def doubled(item: Any) -> Any:
        long = isinstance(item, Tensor) and item.dim() > 0 and len(item) == count
        return torch.cat([item, item]) if long else item

    return mapped(batch, doubled)


def inner_products(gradients: Sequence[Sequence[Tensor]]) -> Tensor:
    """The matrix of g_i'g_j in float64."""
    total = torch.zeros(len(gradients), len(gradients), dtype=torch.float64)
    for pieces in zip(*gradients, strict=True):
        rows = torch.stack([piece.flatten() for piece in pieces]).double()
        total += (rows @ rows.T).cpu()
    return total


def miss(gram: Tensor, shares: Sequence[float]) -> float:
    """|g_0 - sum_i shares_i g_i| / sum_i shares_i |g_i|, from the matrix of inner products."""
    weights = torch.tensor([1.0, *(-share for share in shares)], dtype=torch.float64)
    used = weights != 0  # the mean over no term at all is NaN
    gram, weights = gram[used][:, used], weights[used]
    square = float(weights @ gram @ weights)
    size = float(weights[1:].abs() @ gram.diagonal()[1:].clamp(min=0).sqrt())
    size = size or float(gram[0, 0].clamp(min=0).sqrt())
    if math.isnan(square):
        return math.nan
    return math.sqrt(max(square, 0.0)) / size if size else 0.0
