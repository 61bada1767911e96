"""The style that all figures of a study share, and their files.

Colour and marker tell the variant, the line style the depth; filled markers stand for running
statistics of batch normalisation, open ones for those of the batches. The colours are told apart
with any common colour blindness (Okabe, Ito 2008, with two darker ones).
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fasthessian.results.plots import GREY, figure, tidy
from fasthessian.study.networks import VARIANTS, Network
from fasthessian.study.select import Selection, Value
from fasthessian.study.text import LABELS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

Panels = list[list[Any]]  # Axes in rows; those in perspective have methods of their own


class Look(NamedTuple):
    """How a variant is named and drawn."""

    label: str
    colour: str
    marker: str


_COLOURS = (
    ("#1a1a1a", "o"),
    ("#d55e00", "s"),
    ("#0072b2", "^"),
    ("#e69f00", "v"),
    ("#cc79a7", "D"),
    ("#8b1a4f", "P"),
    ("#56b4e9", "<"),
    ("#009e73", ">"),
    ("#4b3fa8", "X"),
)
LOOKS = {
    variant: Look(LABELS[variant], *look) for variant, look in zip(VARIANTS, _COLOURS, strict=True)
}
LINES = ("-", "--", "-.", ":")  # by depth, the shallowest first
DPI = 120
MOST_BYTES = 120_000  # of a PNG file


class Sketch(NamedTuple):
    """A figure that is drawn but not yet written."""

    name: str  # the file name without a suffix
    title: str
    caption: str
    drawing: Figure


def grid(
    rows: int, columns: int, width: float = 3.4, height: float = 2.7, **options: Any
) -> tuple[Figure, Panels]:
    """A figure of equal panels, each ``width`` x ``height`` inches, and its Axes."""
    fig = figure(max(width * columns, 5.4) + 0.4, height * rows + 0.9)
    fig.set_layout_engine("constrained", h_pad=0.08, w_pad=0.06)
    axes = fig.subplots(rows, columns, squeeze=False, **options)
    return fig, [list(row) for row in axes]


def flat(axes: Panels) -> list[Any]:
    """The panels, row by row."""
    return [ax for row in axes for ax in row]


def line_of(depth: int, selection: Selection) -> str:
    """The line style of a depth."""
    return LINES[selection.depths.index(depth) % len(LINES)]


def drawn_as(network: Network, mode: str, selection: Selection) -> dict[str, Any]:
    """The arguments of ``plot`` for a network; without batch normalisation it is always filled."""
    look = LOOKS[network.variant]
    filled = mode == "eval" or not network.has_batch_norm
    return {
        "color": look.colour,
        "marker": look.marker,
        "linestyle": line_of(network.depth, selection),
        "markerfacecolor": look.colour if filled else "white",
        "markersize": 7 if look.marker in "PX*" else 5,
        "linewidth": 1.4,
    }


def middle(values: Sequence[float]) -> float:
    """The geometric mean, or the arithmetic mean if a number is not positive."""
    array = np.asarray(values)
    return float(np.exp(np.log(array).mean())) if array.min() > 0 else float(array.mean())


def over_seeds(values: Iterable[Value]) -> Value:
    """The mean over seeds, and an interval that contains the interval of every seed."""
    rows = list(values)
    low, high = min(x.low for x in rows), max(x.high for x in rows)
    return Value(middle([x.value for x in rows]), low, high)


def errors(values: Sequence[Value]) -> npt.NDArray[np.float64]:
    """The intervals (2, n) as ``errorbar`` takes them."""
    return np.array([(x.value - x.low, x.high - x.value) for x in values]).clip(min=0).T


def scale(ax: Axes, values: Iterable[float], axis: str = "y") -> None:
    """A logarithmic axis if all values are positive, else one that is linear around 0.

    Over less than four decades its ticks are plain numbers such as 0.5.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    found = np.array([x for x in values if np.isfinite(x) and x != 0])
    if not len(found):
        return
    set_scale = ax.set_yscale if axis == "y" else ax.set_xscale
    if found.min() <= 0:
        set_scale("symlog", linthresh=10.0 ** np.floor(np.log10(np.median(np.abs(found)))))
        return
    set_scale("log")
    lines = ax.yaxis if axis == "y" else ax.xaxis
    lines.set_minor_formatter(NullFormatter())
    span = found.max() / found.min()
    if span < 1e4:
        steps = [1.0, 3.0]
        if span < 100:
            steps = [1.0, 2.0, 5.0]
        if span < 10:
            steps = [1.0, 2.0, 3.0, 5.0]
        if span < 4:
            steps = [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0]
        lines.set_major_locator(LogLocator(subs=steps))
        lines.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))


def spread(numbers: Iterable[int], most: int = 6) -> list[int]:
    """At most so many of the numbers, ascending, with the first and the last."""
    found = sorted(numbers)
    if len(found) <= most:
        return found
    return [found[i] for i in np.linspace(0, len(found) - 1, most).round().astype(int)]


def legend(fig: Figure, handles: Sequence[Line2D]) -> None:
    """A legend below all panels, in as many columns as fit."""
    columns = max(2, int(fig.get_figwidth() / 1.6))
    rows = -(-len(handles) // columns)
    fig.legend(
        handles=list(handles),
        loc="outside lower center",
        ncols=-(-len(handles) // rows),
        fontsize=8,
        frameon=False,
    )


def handles(
    selection: Selection, networks: Iterable[Network], *, depths: bool = False, modes: bool = False
) -> list[Line2D]:
    """Entries of a legend: the variants, and what line styles and open markers mean."""
    from matplotlib.lines import Line2D

    found = list(networks)
    present = {network.variant for network in found}
    entries = [
        Line2D([], [], color=look.colour, marker=look.marker, markersize=5, label=look.label)
        for variant, look in LOOKS.items()
        if variant in present
    ]
    if depths and len({network.depth for network in found}) > 1:
        entries += [
            Line2D([], [], color=GREY, ls=line_of(depth, selection), label=f"depth {depth}")
            for depth in sorted({network.depth for network in found})
        ]
    if modes and len(selection.modes) > 1:
        entries += [
            Line2D([], [], color=GREY, marker="o", ls="", mfc=colour, label=f"{kind} statistics")
            for kind, colour in (("running", GREY), ("batch", "white"))
        ]
    return entries


def whole_epochs(ax: Axes) -> None:
    """Ticks at whole numbers."""
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))


def panel(ax: Axes, title: str, x: str = "", y: str = "") -> Axes:
    """The frame of a panel: title, labels and a light grid."""
    ax.set_title(title, fontsize=9)
    ax.set_xlabel(x, fontsize=9)
    ax.set_ylabel(y, fontsize=9)
    ax.tick_params(labelsize=8)
    ax.grid(True, color="#e5e7eb", linewidth=0.6)
    ax.set_axisbelow(True)
    return tidy(ax)


def files(fig: Figure) -> tuple[bytes, bytes]:
    """The figure as PNG and SVG files, the same bytes at every call; text stays text in the SVG.

    A PNG of more than MOST_BYTES gets a palette of 256 colours, then fewer dots per inch.
    """
    from matplotlib import rc_context

    dpi = DPI
    png = _saved(fig, "png", {"Software": None}, dpi)
    while len(png) > MOST_BYTES and dpi > DPI / 2:
        png = _with_palette(_saved(fig, "png", {"Software": None}, dpi))
        dpi -= 15
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "fasthessian"}):
        return png, _saved(fig, "svg", {"Date": None, "Creator": None}, DPI)


def _saved(fig: Figure, kind: str, metadata: dict[str, Any], dpi: int) -> bytes:
    buffer = io.BytesIO()
    fig.savefig(buffer, format=kind, metadata=metadata, dpi=dpi)
    return buffer.getvalue()


def _with_palette(png: bytes) -> bytes:
    from PIL import Image  # a requirement of matplotlib

    buffer = io.BytesIO()
    colours = Image.open(io.BytesIO(png)).convert("RGB")
    few = colours.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
