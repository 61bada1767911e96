"""The candidate for the next row of a Lanczos run: a random one, and its part of other vectors."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from fasthessian.krylov.dots import dots, gram
from fasthessian.krylov.state import RunState


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
