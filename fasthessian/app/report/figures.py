"""The figures of a report as PNG files."""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from fasthessian.app.analysis import Analysis
from fasthessian.app.options import MATRICES
from fasthessian.app.report.result import Result
from fasthessian.errors import InputError
from fasthessian.results import plots

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIGURES = ("eigenvalues.png", "trace.png", "density.png", "landscape.png", "blocks.png")


def figures(result: Result) -> dict[str, bytes]:
    """The PNG files that the result can fill, by file name.

    Raises:
        ValueError: matplotlib cannot draw a part.
        ImportError: matplotlib is missing.
    """
    drawn = {}
    for name, draw in drawings(result.analysis).items():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # overflow, and letters that the font lacks
                drawn[name] = png(named(draw(), MATRICES[result.options.matrix].name))
        except ImportError:
            raise
        except Exception as error:
            words = " ".join(f"{type(error).__name__}: {error}".split())
            raise InputError(f"{name} cannot be drawn ({words:.300})") from error
    return drawn


def named(fig: Figure, matrix: str) -> Figure:
    """The figure with the name of the matrix, which a record does not know."""
    for ax in fig.axes:
        for text in (ax.title, ax.xaxis.label, ax.yaxis.label):
            text.set_text(text.get_text().replace("Hessian", matrix))
    return fig


def drawings(found: Analysis) -> dict[str, Callable[[], Figure]]:
    """The functions that draw the figures, by file name, in the order of FIGURES."""
    pairs = {name: part for name, part in (("top", found.top), ("bottom", found.bottom)) if part}
    known = [value for part in pairs.values() for value in part.values.tolist()]
    curve = found.density

    def eigenvalues() -> Figure:
        sizes = [len(part.values) for part in pairs.values()]
        fig = plots.figure(4.0 + 0.8 * min(sum(sizes), 10), 4.0)
        panels = fig.subplots(1, len(pairs), squeeze=False, width_ratios=[s + 2 for s in sizes])
        for (name, part), ax in zip(pairs.items(), panels[0], strict=True):
            part.plot(ax)
            ax.set_title(f"{name.title()} {ax.get_title().lower()}", fontweight="bold")
        return fig

    def density() -> Figure:
        fig = plots.figure(8.4)
        if curve is not None:
            plots.plot_density(curve, fig.add_subplot(), eigenvalues=known)
        return fig

    jobs = (
        eigenvalues if pairs else None,
        alone(found.trace),
        density if curve is not None else None,
        alone(found.landscape),
        alone(found.blocks),
    )
    return {name: job for name, job in zip(FIGURES, jobs, strict=True) if job is not None}


class Drawn(Protocol):
    """A record with a figure of its own."""

    def plot(self) -> Axes:
        """Draw it into a new figure."""


def alone(record: Drawn | None) -> Callable[[], Figure] | None:
    """The function that draws one record, if there is one."""
    return None if record is None else lambda: record.plot().get_figure(root=True)  # type: ignore[return-value]


def png(fig: Figure) -> bytes:
    """The figure as the bytes of a PNG file, without dates or versions inside."""
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
