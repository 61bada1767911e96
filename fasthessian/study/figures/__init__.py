"""The figures of a study, from its records alone: one kind per kind of figure in the paper."""

from __future__ import annotations

from collections.abc import Iterator

from fasthessian.study.figures import (
    comparisons,
    curves,
    densities,
    landscapes,
    stability,
    stages,
    style,
)
from fasthessian.study.figures.kind import Kind
from fasthessian.study.records import Study
from fasthessian.study.select import Selection
from fasthessian.study.sheets import Figure

# all kinds, in the order of the report
KINDS: tuple[Kind, ...] = (
    curves.TESTING,
    curves.TRACE,
    curves.TOP,
    stages.STAGES,
    densities.AT_END,
    densities.OVER_EPOCHS,
    landscapes.AT_END,
    landscapes.OVER_EPOCHS,
    comparisons.STATISTICS,
    comparisons.LOSS,
    comparisons.NORM,
    comparisons.EQUAL_LOSS,
    comparisons.CORRELATION,
    stability.STABILITY,
)


def draw(study: Study) -> Iterator[Figure]:
    """The figures of every kind for which the study has data, in the order of KINDS.

    Args:
        study: what was found so far.

    Raises:
        ImportError: matplotlib is missing.

    Example:
        >>> from fasthessian.study.figures import draw
        >>> from fasthessian.study.records import Study
        >>> list(draw(Study({}, (), (), {})))
        []
    """
    selection = Selection(study)
    for kind in KINDS:
        if not kind.lacks(selection):
            for sketch in kind.sketch(selection):
                paper = f" (paper: Figure {kind.paper})" if kind.paper else ""
                png, svg = style.files(sketch.drawing)
                yield Figure(kind.name, sketch.name, sketch.title, sketch.caption + paper, png, svg)


def missing(study: Study) -> dict[str, str]:
    """Why a kind has no figure, in one line, by the name of the kind.

    Example:
        >>> from fasthessian.study.figures import missing
        >>> from fasthessian.study.records import Study
        >>> missing(Study({}, (), (), {}))["testing-curves"]
        'no training has ended'
    """
    selection = Selection(study)
    reasons = {kind.name: kind.lacks(selection) for kind in KINDS}
    return {name: reason for name, reason in reasons.items() if reason}
