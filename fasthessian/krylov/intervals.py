"""Standard error of a mean of quadratic forms, and the quantile of its confidence interval."""

from __future__ import annotations

import math

import torch
from torch import Tensor

SERIES = 30  # degrees of freedom below which Student's t is summed exactly
EXCESS = 4.0  # sample variance over theory's that a fixed symmetric matrix hardly ever reaches


class Spread:
    r"""The variance of ``x = v'Av`` over random signs v, from the products themselves.

    With B = A without its diagonal and y = v * (A v), so that x = sum_i y_i::

        Var x = 2 ||B||_F^2 = 2 sum_i Var y_i            (Hutchinson 1989)

    The right-hand side is a mean of ``|Bv|^2``, whose relative variance is
    ``2 (||B^2||_F^2 - sum_i (B^2)_ii^2) / ||B||_F^4``: at most 2, and near 0 where many eigenvalues
    share the norm. The sample variance of x has a relative variance of up to 14, and is low
    together with the mean of x where x is skewed, so that a run that stops by it stops too early.

    The matrix has to be symmetric and the same in every product. A sample variance of more than 4
    times the theory's shows that it is not, and is taken instead.
    """

    def __init__(self) -> None:
        self._squares = torch.empty(0, dtype=torch.float64, device="cpu")  # estimates of ||B||_F^2
        self._freedom = 0

    def add(self, gram: Tensor) -> None:
        """Take a block of samples by the Gram matrix (b, b) of its rows y, less any one vector."""
        b = len(gram)
        if b > 1:
            gram = gram.cpu()
            centred = gram.diagonal() - 2 * gram.mean(1) + gram.mean()
            self._squares = torch.cat((self._squares, centred.clamp(min=0) * (b / (b - 1))))
            self._freedom += b - 1

    def interval(self, samples: Tensor, confidence: float) -> tuple[float, float]:
        """Standard error of the mean of ``samples`` (s,), and the half-width of its interval."""
        s, mean = len(samples), float(self._squares.mean())
        variance, observed = 2 * mean, float(samples.var())
        # relative variance of a square, one square of the largest possible assumed beforehand
        relative = float((self._squares / mean).var()) if mean else 0.0
        relative = min(2.0, (2 + (s - 1) * relative) / s)
        freedom = int(2 * self._freedom / relative)
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
