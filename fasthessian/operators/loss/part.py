"""One summand of a loss, and how exactly evaluations of it must repeat."""

from __future__ import annotations

from typing import NamedTuple

from fasthessian.operators.loss.batches import Batch

REPEATED = 1e-3  # relative difference allowed between two evaluations of one loss
ROUNDED = 2e-2  # the same for a loss that is computed in 16 bits


class Part(NamedTuple):
    """One summand of the loss: ``weight`` times the loss of ``batch``."""

    position: int  # its number in the pass, which seeds the random numbers of the forward pass
    weight: float
    batch: Batch
    size: int  # how many numbers the batch holds
    first: int = 0  # how many samples come before it in the pass
