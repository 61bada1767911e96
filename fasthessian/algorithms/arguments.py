"""Checks and helpers that every algorithm shares."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fasthessian.operators.base import SymmetricOperator

Progress = Callable[[int, "int | None"], None]  # (products done, products in all if known)


class ConvergenceWarning(UserWarning):
    """A result did not reach the accuracy that was asked for; the record says how far it got."""


def operator(A: Any) -> SymmetricOperator:
    """``A``, or a TypeError that shows how to make an operator."""
    if not isinstance(A, SymmetricOperator):
        raise TypeError(
            f"A must be an operator, got {type(A).__name__}; make one with "
            "fh.Hessian(model, criterion, data) or fh.SymmetricOperator(matvec, n)"
        )
    return A


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """``value`` if it is an integer in [low, high], else a one-line error naming it."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    number = int(value)
    if number < low or (high is not None and number > high):
        bound = f"at least {low}" if high is None else f"from {low} to {high}"
        raise ValueError(f"{name} must be {bound}, got {number}")
    return number


def positive(name: str, value: Any, below: float = math.inf) -> float:
    """``value`` as a float in (0, below), else a one-line error naming it."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if not 0 < number < below:
        bound = "a finite positive number" if below == math.inf else f"between 0 and {below:g}"
        raise ValueError(f"{name} must be {bound}, got {value!r}")
    return number


def seed_of(value: Any) -> int:
    """``value`` if it is a seed the random streams accept."""
    return integer("seed", value, 0, 2**64 - 1)
