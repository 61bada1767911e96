"""Whether the gradient is the derivative of the loss, by central differences of the loss.

It is not the derivative if the loss detaches a part of itself. This may be intended, or the model
differentiates inside and lets autograd record this only in training mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fasthessian import kernels

STEPS = (1.0, 3.0, 0.3)  # times eps^(1/3) of the size of the parameters; tried until one passes
# The largest accepted distance: differences have rounding, and a step may cross kinks
ALLOWED = {torch.float32: 5e-3, torch.float64: 1e-3}
DIRECTIONS = 2  # along a single direction, the slope of an error may be 0 by chance
ROUNDING = 8.0  # the rounding error of a difference, in units of eps |loss| / h
RESOLVED = 0.25  # largest accepted distance between two steps, relative to the distance found


def distance(
    loss: Callable[[Tensor], float],
    here: float,
    gradient: Tensor,
    theta: Tensor,
    dtype: torch.dtype,
) -> float:
    """|G - g| / |g|, where g is the ``gradient`` and G the derivative of the loss.

    It is estimated from differences along random signs u, since E (u'(G - g))^2 = |G - g|^2. Only
    parameters where g is not 0 are moved; g is 0 for padding rows and for detached layers.

    Args:
        loss: returns the loss at theta + its argument (n,).
        here: the loss at theta.
        gradient: g (n,).
        theta: the parameters (n,).
        dtype: the dtype that the loss is computed in, float32 or float64.

    Returns:
        At most ``ALLOWED`` if the gradient is right. NaN if g is 0, or if differences are
        inconclusive: the steps disagree (at kinks and jumps), or rounding hides the slope.
    """
    used = gradient != 0
    count, size = int(used.sum()), float(gradient.double().norm())
    if not count or not math.isfinite(size):
        return math.nan
    eps = torch.finfo(dtype).eps
    unit = float(eps ** (1 / 3)) * (float((theta * used).double().norm()) or 1.0) / math.sqrt(count)
    signs: list[Tensor] = []
    for seed in range(DIRECTIONS):
        u = torch.empty_like(gradient)
        kernels.select(gradient.device).signs_(u, seed, 0)
        signs.append(u.mul_(used))
    want = [float(u.double() @ gradient.double()) for u in signs]
    found: list[list[float]] = []
    best = math.inf
    for step in STEPS:
        h = step * unit
        sides = [((loss(h * u) - here) / h, (here - loss(-h * u)) / h) for u in signs]
        found.append([(up + down) / 2 for up, down in sides])
        # if one side has a kink within h, the slope of the other side is that of the gradient
        misses = [max(min(side) - g, g - max(side), 0.0)
                  for side, g in zip(sides, want, strict=True)]  # fmt: skip
        if not all(map(math.isfinite, found[-1])):
            continue
        best = min(best, max(_size(misses) - ROUNDING * eps * abs(here) / h, 0.0) / size)
        if best <= ALLOWED[dtype]:
            return best
    first, *others = found
    apart = [_size([a - b for a, b in zip(first, other, strict=True)]) for other in others]
    return best if all(gap <= RESOLVED * best * size for gap in apart) else math.nan


def _size(x: Sequence[float]) -> float:
    """The root mean square."""
    return math.sqrt(sum(a * a for a in x) / len(x))
