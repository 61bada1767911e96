"""The verdict on a comparison, and the claim that several comparisons make together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from fasthessian.study.intervals import Difference, Group
from fasthessian.study.sheets import VERDICTS, Claim
from fasthessian.study.text import interval, number

CONFIRMED, CONTRADICTED, UNDECIDED, UNMEASURED = VERDICTS


class Row(NamedTuple):
    """One comparison: its cells but the last, its difference, and what would be confirmed."""

    cells: tuple[str, ...]
    difference: Difference
    sign: int  # of a difference that the paper states


def verdict_of(difference: Difference, sign: int) -> str:
    """The verdict on one comparison; ``sign`` is that of the difference that the paper states.

    Example:
        >>> verdict_of(Difference(-1.0, -1.5, -0.5, seeds=True), -1)
        'confirmed'
        >>> verdict_of(Difference(-1.0, -1.5, -0.5, seeds=False), -1)
        'not decided'
    """
    if not difference.seeds:
        return UNDECIDED
    low, high = sorted((sign * difference.low, sign * difference.high))
    return CONFIRMED if low > 0 else CONTRADICTED if high < 0 else UNDECIDED


def claim_of(
    statement: str, source: str, columns: Sequence[str], rows: Sequence[Row], lacking: str
) -> Claim:
    """The claim of these comparisons; ``lacking`` says which ones there are not, and why."""
    verdicts = [verdict_of(row.difference, row.sign) for row in rows]
    names = [row.cells[0] for row in rows]

    def named(verdict: str) -> str:
        return "; ".join(n for n, v in zip(names, verdicts, strict=True) if v == verdict)

    if not rows:
        verdict, reason = UNMEASURED, ""
    elif CONTRADICTED in verdicts:
        verdict = CONTRADICTED
        reason = f"The interval lies on the other side: {named(CONTRADICTED)}."
    elif UNDECIDED in verdicts:
        verdict, reason = UNDECIDED, _undecided(rows, names)
        if CONFIRMED in verdicts:
            reason += f" As stated: {named(CONFIRMED)}."
    else:
        verdict, reason = CONFIRMED, "Every interval lies on the side that the paper states."
    cells = tuple((*row.cells, v) for row, v in zip(rows, verdicts, strict=True))
    reason = f"{reason} {lacking}".strip()
    return Claim(statement, source, (*columns, "verdict"), cells, verdict, reason)


def _undecided(rows: Sequence[Row], names: Sequence[str]) -> str:
    """Why comparisons are not decided: equal within the interval, or one seed."""
    wide, single = [], []
    for row, name in zip(rows, names, strict=True):
        alone = verdict_of(row.difference._replace(seeds=True), row.sign)
        if not row.difference.seeds:
            side = {CONFIRMED: "as stated", CONTRADICTED: "the other way"}.get(alone, "undecided")
            single.append(f"{name} ({side} without the spread over seeds)")
        elif alone == UNDECIDED:
            wide.append(name)
    parts = []
    if wide:
        parts.append(f"The interval contains equality: {'; '.join(wide)}.")
    if single:
        parts.append(f"One seed says nothing of the spread over seeds: {'; '.join(single)}.")
    return " ".join(parts)


def pair(groups: Sequence[Group | None]) -> str:
    """Geometric means of both networks."""
    return " / ".join(
        number(math.exp(sum(group.values) / len(group.values))) if group else "-"
        for group in groups
    )


def ratio(found: Difference) -> str:
    """A ratio with its interval, from logarithms; ends beyond e^20 are as good as unknown."""
    value, low, high = (math.exp(max(-20.0, min(20.0, x))) for x in found[:3])
    return f"{number(value)} {interval(low, high)}"
