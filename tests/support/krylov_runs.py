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


def rows_of(krylov, count):
    """The first ``count`` rows V (count, n) of a run, widened if they are compressed."""
    basis = krylov.state.basis
    V = basis.stored[:count]
    return V if basis.scale == 1.0 else V.double() / basis.scale


def defects(krylov, spectrum):
    """max |V V' - I| and max |V A V' - T| / max |T| in float64."""
    V = rows_of(krylov, krylov.size).double()
    T = krylov.state.T[: krylov.size, : krylov.size]
    orthogonality = (V @ V.T - torch.eye(krylov.size)).abs().max()
    projection = (V @ (spectrum[:, None] * V.T) - T).abs().max() / T.abs().max()
    return float(orthogonality), float(projection)
