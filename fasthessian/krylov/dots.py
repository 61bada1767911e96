"""The dot products of the engine: all of them are taken by this one function."""

from __future__ import annotations

from types import ModuleType

from torch import Tensor

from fasthessian.kernels.contract import Count


def dots(
    kernels: ModuleType, V: Tensor, W: Tensor, H: Tensor | None = None, *, count: Count = None
) -> tuple[Tensor, Tensor]:
    """``C = V W^T`` (k, b) and ``G = W W^T`` (b, b) in float64, one pass over V and W.

    No other function of the engine calls ``project_``, and no caller adds up dots itself. So this
    is the place where C and G of vectors that are split over ranks can be summed.

    Args:
        kernels: the backend that serves the device of V and W.
        V: rows (k, n).
        W: rows (b, n), b up to 8.
        H: (k, b); if given, ``W -= H^T V`` is done first, in place.
        count: rows of V that take part, default all; C is 0 beyond them.
    """
    C, G = kernels.project_(V, W, H, count=count)
    return C, G


def gram(kernels: ModuleType, W: Tensor) -> Tensor:
    """``G = W W^T`` (b, b) alone."""
    return dots(kernels, W[:0], W)[1]
