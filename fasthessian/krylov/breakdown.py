"""What the coefficients of new rows show: breakdowns, and products that are wrong.

A breakdown is a candidate that holds nothing new: its part outside of the basis is what rounding
left of zero. The rows before it then span an invariant subspace of A, up to rounding.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from fasthessian.errors import InputError
from fasthessian.kernels.contract import CANCELLED
from fasthessian.krylov.coefficients import CoefficientsCopy, Numbers
from fasthessian.krylov.state import RunState
from fasthessian.operators.base import ASYMMETRY, SymmetricOperator

NOISE = 16  # times eps ||T||: what rounding leaves of an exact zero, here and in residuals
HALF_NOISE = 1e-3  # of ||T||: the same for rows rounded to float16, relative error 2^-12 each


class Tolerances(NamedTuple):
    """What the rounding of a run's rows explains."""

    rounding: float  # times ||T||: the norm of a candidate that holds nothing new
    asymmetry: float  # times max |T|: differences of q_i'A q_j and q_j'A q_i

    @classmethod
    def of(cls, dtype: torch.dtype, compressed: bool) -> Tolerances:
        """Of rows of a dtype, or of compressed rows."""
        if compressed:
            return cls(HALF_NOISE, 10 * ASYMMETRY[torch.float32])
        return cls(NOISE * torch.finfo(dtype).eps, 10 * ASYMMETRY[dtype])

    def noise(self, T: Numbers, j: int) -> float:
        """The norm up to which a candidate after j rows may be rounding: rounding * ||T_j||."""
        return self.rounding * float(abs(T[:j, :j]).sum(1).max())

    def is_noise(self, T: Numbers, j: int, norm: float) -> bool:
        """Whether a candidate after j rows is rounding; a random one, without couplings, is not."""
        return bool(T[j, :j].any()) and norm <= self.noise(T, j)


class Verdict(NamedTuple):
    """Which of the new rows may stay."""

    rows: int  # rows that stand; the next candidate holds nothing new if `broken`
    broken: bool
    lost: float  # norm of what is discarded at a breakdown
    skew: float  # largest difference of q_i'A q_j and q_j'A q_i so far


def judged(
    A: SymmetricOperator, copy: CoefficientsCopy, tolerances: Tolerances, state: RunState
) -> Verdict:
    """Check the rows that ``state`` has not judged yet, and the candidate.

    Raises:
        ValueError: products are not finite, or A is not symmetric.
    """
    size, skew = copy.size, state.skew
    T, gauges = copy.numbers[:, : size + 1], copy.numbers[:, -3:]
    for j in range(state.judged, size):
        uu, nu2, asymmetry = gauges[j].tolist()
        scale = float(abs(T[: j + 1, : j + 1]).max())
        if not all(map(math.isfinite, (uu, nu2, asymmetry, scale))):
            raise InputError(f"{A} returned NaN or Inf for a finite vector")
        if not nu2 > CANCELLED * uu:
            return Verdict(j, True, 0.0, skew)
        if tolerances.is_noise(T, j, math.sqrt(uu)):
            return Verdict(j, True, math.sqrt(uu), skew)
        skew = max(skew, asymmetry)
        if asymmetry > tolerances.asymmetry * scale + state.dropped:
            raise InputError(
                f"A is not symmetric: q_i'Aq_j and q_j'Aq_i differ by {asymmetry:.3g} "
                f"at a scale of {scale:.3g}; pass a symmetric operator"
            )
    broken = size < A.n and tolerances.is_noise(T, size, copy.beta)
    return Verdict(size, broken, copy.beta, skew)
