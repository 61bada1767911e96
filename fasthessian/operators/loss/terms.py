"""How many terms of the loss each part of the data has.

A loss is usually a mean over terms: samples, elements, valid tokens. So the loss of all data is the
mean of the batches' losses, weighted by their numbers of terms::

    batch 1 has 3 valid tokens and the loss 2, batch 2 has 1 valid token and the loss 6
    L = (3 * 2 + 1 * 6) / (3 + 1) = 3,  not (2 + 6) / 2 = 4

If the loss is a sum, each part counts 1. The number of terms of a part comes from the first of
these that applies:

* the user: ``weights`` of the operator;
* the options of the criterion, if it is one of torch's (``criteria``);
* the loss itself (``counting``): the divisor of its sum is read in the graph (``denominators``) and
  confirmed on the gradients of a few batches that are cut in two (``halving``). That needs
  evaluations of the loss. Until it is done, ``criteria`` makes a guess.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

from fasthessian.errors import InputError, InputTypeError
from fasthessian.operators.loss.batches import Batch
from fasthessian.operators.loss.counting import CountingRule
from fasthessian.operators.loss.criteria import is_torch_loss, number_of_terms, option
from fasthessian.operators.loss.halving import SAME, SUM

GRAPH = "the divisor in the graph of each loss"
NO_TERMS = "data holds no term of the loss: every target is ignored"


class Terms:
    """The numbers of terms of batches and of their chunks.

    Args:
        criterion: see ``Hessian``.
        weights: see ``Hessian``.
    """

    def __init__(self, criterion: Any, weights: Any) -> None:
        self._criterion = criterion
        self.given = _weights(weights)
        self.rule: CountingRule | None = None  # found by ``counting``
        self.given_per_chunk = True  # whether the user's function served all chunks so far

    @property
    def known(self) -> bool:
        """Whether the numbers are no guess."""
        return self.rule is not None or is_torch_loss(self._criterion)

    @property
    def summed(self) -> bool:
        """Whether the loss is the sum over its terms, and not their mean."""
        if self.rule is None:
            return bool(option(self._criterion, "reduction") == "sum")
        return self.rule.counter == SUM

    @property
    def way(self) -> str:
        """How the terms are counted, if that was found out from the loss; else ""."""
        return "" if self.rule is None else self.rule.counter or GRAPH

    @property
    def uneven(self) -> bool:
        """Whether some samples are known to have more terms than others."""
        return self.rule is not None and self.rule.uneven

    def number(self, batch: Batch, found: Sequence[float] = (), position: int = -1) -> float:
        """The number of terms of a batch whose loss has the denominators ``found``.

        If the numbers are known only from the graphs of one pass, ``position`` in a pass tells.
        """
        if self.rule is None:
            return number_of_terms(self._criterion, batch)
        if self.rule.counter is None and position >= 0:
            values = self.rule.values
            return values[position] if position < len(values) else 0.0
        return self.rule.of(batch, found)

    def weight(self, index: int, batch: Batch) -> float:
        """The weight of a whole batch that the user gave."""
        if callable(self.given):
            value = float(self.given(batch))
        else:
            value = self.given[index] if self.given and index < len(self.given) else 0.0
        if not (math.isfinite(value) and value >= 0):
            raise InputError(
                f"weights must be finite and not negative, got {value} for batch {index}"
            )
        return value

    def check_length(self, batches: int) -> None:
        """Raise ValueError unless the user gave as many weights as there are batches."""
        if isinstance(self.given, list) and len(self.given) != batches:
            raise InputError(
                f"weights must have one entry per batch ({batches}), got {len(self.given)}"
            )

    def given_numbers(self, batch: Batch, chunks: Sequence[Batch]) -> list[float] | None:
        """The chunks' numbers of terms by the user's function, if they add up to the batch's."""
        if self.summed or not callable(self.given):
            return None
        numbers = [float(self.given(chunk)) for chunk in chunks]
        whole = float(self.given(batch))
        return numbers if abs(sum(numbers) - whole) <= SAME * abs(whole) else None

    def of_chunks(
        self, index: int, batch: Batch, chunks: Sequence[Batch], first: int
    ) -> tuple[float, list[float]]:
        """The weight of a batch, and those of its chunks; the first chunk has number ``first``."""
        numbers = [self.number(chunk, (), first + i) for i, chunk in enumerate(chunks)]
        if self.given is None:
            return sum(numbers), numbers
        weight = self.weight(index, batch)
        if len(chunks) == 1:
            return weight, [weight]
        given = self.given_numbers(batch, chunks)
        self.given_per_chunk &= given is not None
        numbers = given or numbers
        total = 1.0 if self.summed else sum(numbers) or 1.0
        return weight, [weight * number / total for number in numbers]


def _weights(weights: Any) -> list[float] | Callable[[Batch], float] | None:
    """None for "auto", or the weights as a list or a function."""
    if isinstance(weights, str) and weights == "auto":
        return None
    if callable(weights):
        function: Callable[[Batch], float] = weights
        return function
    try:
        if isinstance(weights, (Mapping, Set)):  # these have no order of batches
            raise TypeError
        return [float(weight) for weight in weights]
    except (TypeError, ValueError):
        raise InputTypeError(
            f"weights must be 'auto', a sequence of numbers or a callable of a batch, "
            f"got {weights!r:.80}"
        ) from None
