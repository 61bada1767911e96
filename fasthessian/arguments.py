"""Checks of arguments; each raises a one-line error that names the argument."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from fasthessian.errors import InputError, InputTypeError

ProgressCallback = Callable[[int, "int | None"], None]  # (products done, total if known)


def integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """``value`` if it is an integer in [low, high], else a one-line error naming it."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise InputTypeError(f"{name} must be an integer, got {value!r}")
    number = int(value)
    if number < low or (high is not None and number > high):
        bound = f"at least {low}" if high is None else f"from {low} to {high}"
        raise InputError(f"{name} must be {bound}, got {number}")
    return number


def positive(name: str, value: Any, below: float = math.inf) -> float:
    """``value`` as a float in (0, below), else a one-line error naming it."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise InputTypeError(f"{name} must be a number, got {value!r}") from None
    if not 0 < number < below:
        bound = "a finite positive number" if below == math.inf else f"between 0 and {below:g}"
        raise InputError(f"{name} must be {bound}, got {value!r}")
    return number


def seed_of(value: Any) -> int:
    """``value`` if the random streams accept it as a seed."""
    return integer("seed", value, 0, 2**64 - 1)
