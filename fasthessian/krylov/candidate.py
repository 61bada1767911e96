"""The two vectors of a Lanczos step: the candidate for the next row, and the scale of its product.

The scale is a power of 2 that keeps the squares of A's norm within float32's range.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fasthessian.krylov.space import Space
from fasthessian.krylov.state import RunState

LEAST = 2.0**-40  # norm of A, or its inverse, from which on products are scaled


def draw_(
    state: RunState, space: Space, *, signs: bool, append: bool, start: Tensor | None = None
) -> None:
    """A random unit vector orthogonal to the rows, from the next n numbers of the stream.

    Args:
        state: of the run; its candidate is replaced.
        space: of the run.
        signs: random signs, else normals.
        append: store it as the row after the final ones, as cgs2 does.
        start: (j, width) vectors whose sum is added with the same length, if there are no rows.
    """
    u = state.u
    space.draw_(u[0], state.seed, state.next_offset(), signs=signs)
    for _ in range(2 if state.size else 0):
        state.basis.project_out_(u, count=state.size)
    _normalise_(u, space)
    if start is not None:
        _mix_(u, start, space)
    if append:
        state.basis.store(state.size, u[0])
    state.coefficients.set_candidate(state.size, 1.0)


def _normalise_(u: Tensor, space: Space) -> None:
    """Scale u (1, n) to norm 1."""
    none = torch.zeros(0, 1, dtype=torch.float64, device=u.device)
    space.kernels.update_(u[:0], u, none, space.gram(u).rsqrt())


def _mix_(u: Tensor, start: Tensor, space: Space) -> None:
    """Add the direction of the sum of ``start`` (j, width) to the unit vector u (1, width).

    Its sign is the one with which it does not cancel u. If the sum is 0, u is left.
    """
    w = space.rows(1)
    space.kernels.update_(start, w, -torch.ones_like(start[:, :1], dtype=torch.float64))
    C, _ = space.dots(w, u)
    G = space.gram(w)
    space.kernels.update_(w, u, torch.where(G > 0, G.rsqrt() * torch.where(C < 0, 1.0, -1.0), 0.0))
    _normalise_(u, space)


def add_part_(state: RunState, space: Space, w: Tensor, factor: float, v: Tensor) -> None:
    """Add ``factor (q'v) q`` to w (1, n) for v (1, n), q the direction of the candidate."""
    u = state.u
    C, _ = space.dots(u, v)
    G = space.gram(u)
    space.kernels.update_(u, w, torch.where(G > 0, -factor * C / G, 0.0))


def factor_for(space: Space, w: Tensor) -> float:
    """What to multiply the products of A by, as the product w (1, n) of a unit vector tells."""
    size = math.sqrt(float(space.gram(w)))
    extreme = math.isfinite(size) and size > 0 and not LEAST < size < 1 / LEAST
    return 2.0 ** -max(-126, min(126, math.floor(math.log2(size)))) if extreme else 1.0


def next_norm2(C: Tensor, G: Tensor, S: Tensor) -> Tensor:
    """|u|^2 of the candidate that a step makes, from the dots of the step before it is made.

    ``u = (w - V'z) / nu - t q_j``, where the first term has the part t along q_j and none in V, so
    that ``|u|^2 = (w'w - z'z) / nu^2 - t^2``. Where vectors are split over ranks, this saves a
    collective. Cancellation leaves an error of about ``eps ||A||^2``: it tells when Ritz pairs have
    converged, but a breakdown is seen one step later, by the norm that is then measured.
    """
    z, (mu, down) = C[:, 1], S[1].flip(0).unbind()
    t = torch.where(mu > 0, -down / mu, 0.0)
    return ((G[1, 1] - z @ z) * mu**2 - t**2).clamp(min=0.0)
