"""The distance between a derivative and central differences."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# The largest accepted relative distance between a product and central differences of gradients.
# Differences have rounding (some losses are always float32), and a step may cross kinks.
DIFFERENCE = {torch.float32: 5e-2, torch.float64: 1e-3}


def distances(at: Callable[[float], Tensor], unit: float, want: Tensor) -> tuple[float, float]:
    """Central differences of ``at(h)`` around h = 0, in three steps.

    Args:
        at: a function of h.
        unit: the scale of h; the steps are about eps^(1/3) of it, with eps of the dtype.
        want: the derivative to be checked.

    Returns:
        The smallest distance between a difference and ``want``, and the smallest distance between
        two differences. Both are relative to ``want``, or to ``at(0) / unit`` if ``want`` is 0.
    """
    size = float(want.double().norm()) or float(at(0.0).double().norm()) / unit or 1.0
    unit *= torch.finfo(want.dtype).eps ** (1 / 3)
    found = []
    for h in (30 * unit, unit, 0.03 * unit):  # kinks need small steps, rounding large ones
        found.append((at(h).double() - at(-h).double()) / (2 * h))
    gaps = [float((slope - want.double()).norm()) for slope in found]
    apart = [float((found[i] - found[j]).norm()) for i, j in ((0, 1), (1, 2), (0, 2))]
    return min(gaps) / size, min(apart) / size
