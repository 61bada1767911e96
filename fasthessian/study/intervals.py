"""Intervals of differences between networks, over seeds and over random probes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

from fasthessian.krylov.intervals import student_t
from fasthessian.study.records import Measurement
from fasthessian.study.select import Value

CONFIDENCE, NORMAL = 0.95, 1.96
Quantity = Callable[[Measurement], Value]


class Group(NamedTuple):
    """One number per seed, and the standard error with which each was measured."""

    values: tuple[float, ...]
    errors: tuple[float, ...]
    shared: float = 0.0  # a standard error that all seeds have in common


class Difference(NamedTuple):
    """A difference with its interval at 95 %."""

    value: float
    low: float
    high: float
    seeds: bool  # whether the interval covers the spread over seeds


def logarithms(rows: Sequence[Measurement], quantity: Quantity) -> Group | None:
    """The logarithm of a quantity per seed; None if there is none or one is not positive.

    The relative half-width of an interval is 1.96 standard errors of the logarithm.
    """
    found = [quantity(row) for row in rows]
    if not found or min(x.value for x in found) <= 0:
        return None
    errors = tuple((x.high - x.low) / (2 * NORMAL * x.value) for x in found)
    return Group(tuple(math.log(x.value) for x in found), errors)


def contrast(terms: Sequence[tuple[float, Group]]) -> Difference:
    """``sum_i c_i mean_i`` over groups of seeds, with Welch's interval.

    The variance of a group's mean is that over its seeds (which contains the error of the
    measurement), but at least what the probes alone add; ``shared`` is added to it and does not
    fall with the number of seeds. The degrees of freedom are Satterthwaite's. If a group has one
    seed, only the errors of the measurement enter.

    Args:
        terms: pairs (c_i, group); a difference of two groups has c = 1, -1.

    Source: Welch 1947, "The generalization of Student's problem when several different population
    variances are involved".

    Example:
        >>> a, b = Group((2.0, 2.2), (0.0, 0.0)), Group((1.0, 1.2), (0.0, 0.0))
        >>> round(contrast([(1, a), (-1, b)]).value, 6)
        1.0
    """
    value = sum(c * _mean(group.values) for c, group in terms)
    seeds = all(len(group.values) > 1 for _, group in terms)
    parts = [c**2 * _variance(group) / len(group.values) for c, group in terms]
    total = sum(parts) + sum((c * group.shared) ** 2 for c, group in terms)
    if not seeds:
        width = NORMAL * math.sqrt(total)
    else:
        counts = [len(group.values) for _, group in terms]
        share = sum(part**2 / (n - 1) for part, n in zip(parts, counts, strict=True))
        width = (quantile(total**2 / share) if share else NORMAL) * math.sqrt(total)
    return Difference(value, value - width, value + width, seeds)


def quantile(freedom: float) -> float:
    """Student's t at 95 %, two-sided, for a real number of degrees of freedom, at least 1.

    Between integers log t is linear in 1 / freedom: up to 3 % too large, never too small.
    """
    low = math.floor(freedom)
    share = (1 / low - 1 / freedom) / (1 / low - 1 / (low + 1))
    ends = student_t(CONFIDENCE, low), student_t(CONFIDENCE, low + 1)
    return float(ends[0] ** (1 - share) * ends[1] ** share)


def common_loss(paths: Sequence[Sequence[Measurement]]) -> float | None:
    """The lowest training loss that all paths reach and all start above; None if there is none.

    Checkpoints before training (epoch 0) do not count.
    """
    losses = [[row.loss for row in _trained(path)] for path in paths]
    if not losses or not all(losses):
        return None
    level = max(min(path) for path in losses)
    return level if all(max(path) >= level for path in losses) else None


def at_loss(
    paths: Sequence[Sequence[Measurement]], level: float, quantity: Quantity
) -> Group | None:
    """The logarithm of a quantity where each path last crosses a training loss.

    log quantity is interpolated linearly in log loss between two checkpoints.
    """
    values, errors = [], []
    for path in paths:
        found = _crossing(_trained(path), level, quantity)
        if found is None:
            return None
        values.append(found[0])
        errors.append(found[1])
    return Group(tuple(values), tuple(errors)) if values else None


def _crossing(
    path: Sequence[Measurement], level: float, quantity: Quantity
) -> tuple[float, float] | None:
    """The logarithm at the last crossing of the level, and its standard error."""
    if not path:
        return None
    before = after = path[-1]
    if after.loss != level:
        for before, after in reversed(list(pairwise(path))):
            if (before.loss - level) * (after.loss - level) <= 0:
                break
        else:
            return None
    group = logarithms([before, after], quantity)
    if group is None:
        return None
    fall = math.log(before.loss / after.loss)
    share = math.log(before.loss / level) / fall if fall else 1.0
    value = (1 - share) * group.values[0] + share * group.values[1]
    return value, math.hypot((1 - share) * group.errors[0], share * group.errors[1])


def spearman(x: Sequence[float], y: Sequence[float]) -> Difference | None:
    """Rank correlation of n pairs with its interval; None if n < 4 or one side is constant.

    On Fisher's scale the standard error is sqrt(1.06 / (n - 3)) (Fieller, Hartley, Pearson 1957).
    A perfect order counts there as one swap less, so that four networks never decide.
    """
    n = len(x)
    if n < 4 or len(set(x)) == 1 or len(set(y)) == 1:
        return None
    a, b = _ranks(x), _ranks(y)
    middle = (n + 1) / 2
    both = sum((p - middle) * (q - middle) for p, q in zip(a, b, strict=True))
    sizes = [sum((p - middle) ** 2 for p in ranks) for ranks in (a, b)]
    value = both / math.sqrt(sizes[0] * sizes[1])
    most = 1 - 12 / (n**3 - n)  # what one swap of neighbours leaves; the scale ends at 1
    z = math.atanh(max(-most, min(most, value)))
    width = NORMAL * math.sqrt(1.06 / (n - 3))
    return Difference(value, math.tanh(z - width), math.tanh(z + width), True)


def _ranks(x: Sequence[float]) -> list[float]:
    """Ranks from 1; equal numbers share their mean rank."""
    return [sum(v < u for v in x) + (sum(v == u for v in x) + 1) / 2 for u in x]


def _trained(path: Sequence[Measurement]) -> list[Measurement]:
    return [row for row in path if row.epoch > 0 and row.loss > 0]


def _mean(x: Sequence[float]) -> float:
    return sum(x) / len(x)


def _variance(group: Group) -> float:
    """Variance of one value: over the seeds, and at least that of the measurement."""
    measured = _mean([error**2 for error in group.errors])
    if len(group.values) < 2:
        return measured
    middle = _mean(group.values)
    over_seeds = sum((x - middle) ** 2 for x in group.values) / (len(group.values) - 1)
    return max(over_seeds, measured)
