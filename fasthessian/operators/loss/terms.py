"""The number of terms of each part of the data: by the criterion, counted, or as the user says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from fasthessian.errors import InputError, InputTypeError
from fasthessian.operators.loss.batches import Batch
from fasthessian.operators.loss.counting import Count
from fasthessian.operators.loss.criteria import is_torch_loss, option, terms
from fasthessian.operators.loss.halving import SAME, SUM


class Terms:
    """How the terms of a loss are counted.

    Args:
        criterion: as of ``Hessian``.
        weights: as of ``Hessian``.
    """

    def __init__(self, criterion: Any, weights: Any) -> None:
        self._criterion = criterion
        self.given = _checked(weights)
        self.way: Count | None = None  # None: as the criterion says, or by a guess
        self.told_all = True  # whether the user's weights tell those of all chunks

    @property
    def known(self) -> bool:
        """Whether the numbers are no guess."""
        return self.way is not None or is_torch_loss(self._criterion)

    @property
    def summed(self) -> bool:
        """Whether the loss is a sum over its terms, and not their mean."""
        if self.way is None:
            return bool(option(self._criterion, "reduction") == "sum")
        return self.way.words == SUM

    @property
    def uneven(self) -> bool:
        """Whether some samples are known to have more terms than others."""
        return self.way is not None and self.way.uneven

    def number(self, batch: Batch, found: Sequence[float] = (), position: int = -1) -> float:
        """The number of terms of a batch: by its place in the pass, or by its own ``found``."""
        if self.way is None:
            return terms(self._criterion, batch)
        if self.way.words is None and position >= 0:
            values = self.way.values
            return values[position] if position < len(values) else 0.0
        return self.way.of(batch, found)

    def weight(self, index: int, batch: Batch) -> float:
        """The weight of a whole batch, as the user says."""
        if callable(self.given):
            value = float(self.given(batch))
        else:
            value = self.given[index] if self.given and index < len(self.given) else 0.0
        if not (math.isfinite(value) and value >= 0):
            raise InputError(
                f"weights must be finite and not negative, got {value} for batch {index}"
            )
        return value

    def told(self, batch: Batch, chunks: Sequence[Batch]) -> list[float] | None:
        """The numbers of terms of chunks by a callable of the user's, if they add up."""
        if self.summed or not callable(self.given):
            return None
        counts = [float(self.given(chunk)) for chunk in chunks]
        whole = float(self.given(batch))
        return counts if abs(sum(counts) - whole) <= SAME * abs(whole) else None

    def of_chunks(
        self, index: int, batch: Batch, chunks: Sequence[Batch], first: int
    ) -> tuple[float, list[float]]:
        """The weight of a batch, and those of its chunks, which follow ``first`` others."""
        counts = [self.number(chunk, (), first + i) for i, chunk in enumerate(chunks)]
        if self.given is None:
            return sum(counts), counts
        weight = self.weight(index, batch)
        if len(chunks) == 1:
            return weight, [weight]
        told = self.told(batch, chunks)
        self.told_all &= told is not None
        counts = told or counts
        together = 1.0 if self.summed else sum(counts) or 1.0
        return weight, [weight * count / together for count in counts]


def _checked(weights: Any) -> list[float] | Callable[[Batch], float] | None:
    """None for "auto", or the weights in the form that was given."""
    if isinstance(weights, str) and weights == "auto":
        return None
    if callable(weights):
        checked: Callable[[Batch], float] = weights
        return checked
    try:
        if isinstance(weights, (Mapping, Set)):  # these have no order of batches
            raise TypeError
        return [float(weight) for weight in weights]
    except (TypeError, ValueError):
        raise InputTypeError(
            f"weights must be 'auto', a sequence of numbers or a callable of a batch, "
            f"got {weights!r:.80}"
        ) from None
