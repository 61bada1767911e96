"""The scale of products: a power of 2 that keeps the squares of A's norm within float32's range."""

from __future__ import annotations

import math
from types import ModuleType

from torch import Tensor

from fasthessian.krylov.dots import gram

LEAST = 2.0**-40  # norm of A, or its inverse, from which on products are scaled


def factor_for(kernels: ModuleType, w: Tensor) -> float:
    """What to multiply the products of A by, as the product w (1, n) of a unit vector tells."""
    size = math.sqrt(float(gram(kernels, w)))
    extreme = math.isfinite(size) and size > 0 and not LEAST < size < 1 / LEAST
    return 2.0 ** -max(-126, min(126, math.floor(math.log2(size)))) if extreme else 1.0
