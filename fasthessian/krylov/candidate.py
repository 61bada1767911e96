"""The two vectors of a Lanczos step: the candidate for the next row, and the scale of its product.

The scale is a power of 2 that keeps the squares of A's norm within float32's range.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch
from torch import Tensor

from fasthessian.krylov.dots import dots, gram
from fasthessian.krylov.state import RunState

LEAST = 2.0**-40  # norm of A, or its inverse, from which on products are scaled


def draw_(state: RunState, kernels: ModuleType, *, signs: bool, append: bool) -> None:
    """A random unit vector orthogonal to the rows, from the next n numbers of the stream.

    Args:
        state: of the run; its candidate is replaced.
        kernels: of the run.
        signs: random signs, else normals.
        append: store it as the row after the final ones, as cgs2 does.
    """
    u = state.u
    fill = kernels.signs_ if signs else kernels.normal_
    fill(u[0], state.seed, state.next_offset())
    for _ in range(2 if state.size else 0):
        state.basis.project_out_(u, count=state.size)
    none = torch.zeros(0, 1, dtype=torch.float64, device=u.device)
    kernels.update_(u[:0], u, none, gram(kernels, u).rsqrt())
    if append:
        state.basis.store(state.size, u[0])
    state.coefficients.set_candidate(state.size, 1.0)


def add_part_(state: RunState, kernels: ModuleType, w: Tensor, factor: float, v: Tensor) -> None:
    """Add ``factor (q'v) q`` to w (1, n) for v (1, n), q the direction of the candidate."""
    u = state.u
    C, _ = dots(kernels, u, v)
    G = gram(kernels, u)
    kernels.update_(u, w, torch.where(G > 0, -factor * C / G, 0.0))


def factor_for(kernels: ModuleType, w: Tensor) -> float:
    """What to multiply the products of A by, as the product w (1, n) of a unit vector tells."""
    size = math.sqrt(float(gram(kernels, w)))
    extreme = math.isfinite(size) and size > 0 and not LEAST < size < 1 / LEAST
    return 2.0 ** -max(-126, min(126, math.floor(math.log2(size)))) if extreme else 1.0
