"""The descents whose sharpness is followed: at constant rates, on all images or in batches."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from fasthessian.arguments import positive
from fasthessian.errors import InputError

STEPS, EPOCHS = 400, 80  # of gradient descent, and of SGD
BATCH = 32  # images per step of SGD
MEASURED = 20  # times that a descent is measured, besides its start


@dataclasses.dataclass(frozen=True)
class Descent:
    """One descent without momentum.

    Attributes:
        rate: learning rate eta.
        batch: images per step; None: all, which is gradient descent.
        steps: number of steps.
        every: steps between two measurements.

    Example:
        >>> Descent(0.05, None, 400, 20).name
        'descent-lr0.05'
    """

    rate: float
    batch: int | None
    steps: int
    every: int

    @property
    def name(self) -> str:
        """The name of its folder."""
        return f"descent-lr{self.rate:g}" + f"-batch{self.batch}" * (self.batch is not None)


def descents(rates: Sequence[float], images: int) -> list[Descent]:
    """Gradient descent with each rate, and SGD with the first one, for so many images.

    Raises:
        TypeError, ValueError: a rate is not positive, or two are the same.

    Example:
        >>> [descent.name for descent in descents([0.05, 0.03], 4660)]
        ['descent-lr0.05', 'descent-lr0.03', 'descent-lr0.05-batch32']
    """
    for rate in rates:
        positive("edge_of_stability", rate)
    if len({f"{rate:g}" for rate in rates}) < len(rates):
        given = " ".join(f"{rate:g}" for rate in rates)
        raise InputError(f"edge_of_stability must be rates that differ in six digits, got {given}")
    found = [Descent(rate, None, STEPS, STEPS // MEASURED) for rate in rates]
    batch = min(BATCH, max(1, images // 2))
    every = -(-EPOCHS * images // (batch * MEASURED))
    return found + [Descent(rate, batch, MEASURED * every, every) for rate in rates[:1]]
