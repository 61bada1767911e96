"""What a kind of figure is: its title, what it needs, and the function that draws it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from fasthessian.study.figures.style import Sketch
from fasthessian.study.select import Selection


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of figure.

    Attributes:
        name: of the kind, and the start of its file names.
        title: one line.
        paper: the figures of the paper that show the same; "" if none does.
        needs: the variants, depths, statistics and epochs that a study must have for it.
        lacks: what a study lacks for this kind, in one line; "" if nothing.
        sketch: draws the figures of this kind.
    """

    name: str
    title: str
    paper: str
    needs: str
    lacks: Callable[[Selection], str] = dataclasses.field(repr=False)
    sketch: Callable[[Selection], Iterator[Sketch]] = dataclasses.field(repr=False)


def no_end(selection: Selection) -> str:
    """A reason if no trained network was measured."""
    return "" if selection.end > 0 else "no checkpoint after training was measured"


def no_two_epochs(selection: Selection) -> str:
    """A reason if no network was measured at two epochs."""
    for network in selection.networks:
        for mode in selection.modes:
            if len(selection.by_epoch(network, mode)) > 1:
                return ""
    return "no network was measured at two epochs"
