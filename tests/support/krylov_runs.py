"""Lanczos runs of a given size, and their errors of orthogonality and projection."""

import torch

from fasthessian.krylov.lanczos import Lanczos
from tests.support.backends import ROWS

BACKENDS = [row.name for row in ROWS if row.device == "cpu" and not row.slow]


SCHEDULES = ["dcgs2", "cgs2"]


def grown(A, steps, **options):
    krylov = Lanczos(A, steps, **{"seed": 0, **options})
    while krylov.size < krylov.capacity and not krylov.state.exhausted:
        krylov.step()
    return krylov


def defects(krylov, spectrum):
    """max |V V' - I| and max |V H V' - T| / max |T| in float64."""
    V = krylov.state.basis.rows(krylov.size).double()
    T = krylov.state.T[: krylov.size, : krylov.size]
    orthogonality = (V @ V.T - torch.eye(krylov.size)).abs().max()
    projection = (V @ (spectrum[:, None] * V.T) - T).abs().max() / T.abs().max()
    return float(orthogonality), float(projection)
