"""Standard error of a mean of quadratic forms, and the quantile of its confidence interval."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from fasthessian.checkpoints.state import State

SERIES = 30  # degrees of freedom below which Student's t is summed exactly
EXCESS = 4.0  # sample variance over theory: a fixed symmetric matrix hardly ever reaches it


@dataclasses.dataclass
class Spread(State):
    r"""The variance of ``x = v'Av`` over random signs v, from the products themselves.

    With B = A without its diagonal and y = v * (A v), so that x = sum_i y_i::

        Var x = 2 ||B||_F^2 = 2 sum_i Var y_i            (Hutchinson 1989)

    The right-hand side is estimated by a mean of ``|Bv|^2``, whose relative variance is
    ``2 (||B^2||_F^2 - sum_i (B^2)_ii^2) / ||B||_F^4``: at most 2, and near 0 if many eigenvalues
    share the norm. The sample variance of x has a relative variance of up to 14. If x is skewed it
    is low when the mean of x is low, so that a run that stops by it stops too early.

    The matrix must be symmetric and the same in every product. If the sample variance is more than
    4 times the variance by this theory, the matrix is not, and the sample variance is used.
    """

    squares: Tensor = dataclasses.field(  # estimates of ||B||_F^2
        default_factory=lambda: torch.empty(0, dtype=torch.float64, device="cpu")
    )
    freedom: int = 0

    def add(self, gram: Tensor) -> None:
        """Add a block of samples: the Gram matrix (b, b) of its rows y, each less one vector."""
        b = len(gram)
        if b > 1:
            gram = gram.cpu()
            centred = gram.diagonal() - 2 * gram.mean(1) + gram.mean()
            self.squares = torch.cat((self.squares, centred.clamp(min=0) * (b / (b - 1))))
            self.freedom += b - 1

    def interval(self, samples: Tensor, confidence: float) -> tuple[float, float]:
        """Standard error of the mean of ``samples`` (s,), and the half-width of its interval."""
        s, mean = len(samples), float(self.squares.mean())
        variance, observed = 2 * mean, float(samples.var())
        # relative variance of a square; the prior is one square of the largest possible variance
        relative = float((self.squares / mean).var()) if mean else 0.0
        relative = min(2.0, (2 + (s - 1) * relative) / s)
        freedom = int(2 * self.freedom / relative)
        if observed > EXCESS * variance:
            variance, freedom = observed, s - 1
        stderr = math.sqrt(variance / s)
        return stderr, student_t(confidence, max(freedom, 1)) * stderr


def student_t(confidence: float, df: int) -> float:
    """Two-sided quantile of Student's t with df degrees of freedom.

    Below 30 the distribution is a finite sum (Abramowitz, Stegun 26.7.3 and 26.7.4), solved by
    bisection. From there on Cornish-Fisher (26.7.5): within 1e-6 at confidence <= 0.999.
    """
    if df < SERIES:
        low, high = 0.0, math.pi / 2
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if _within(middle, df) < confidence else (low, middle)
        return math.sqrt(df) * math.tan(low)
    z = math.sqrt(2) * float(
        torch.erfinv(torch.tensor(confidence, dtype=torch.float64, device="cpu"))
    )
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return math.fsum(term / df**power for power, term in enumerate(terms))


def _within(theta: float, df: int) -> float:
    """P(|t| <= sqrt(df) tan(theta))."""
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = df % 2
    term, total = (cosine if odd else 1.0), 0.0
    for j in range(1 + odd, df, 2):
        total += term
        term *= cosine**2 * j / (j + 1)
    return 2 / math.pi * (theta + sine * total) if odd else sine * total
