"""The spectral density of the Hessian, at the end of training and over the epochs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from fasthessian.study.figures import style
from fasthessian.study.figures.kind import Kind, no_end, no_two_epochs
from fasthessian.study.networks import Network
from fasthessian.study.records import Measurement
from fasthessian.study.select import MODES, Selection
from fasthessian.study.text import name_of, number

Array = npt.NDArray[np.float64]
POINTS = 600  # of a curve, besides those around the nodes
REACH = 7  # kernel widths that are drawn beyond the nodes
LABELS = "eigenvalue", "density"
FLOOR = 1e-9  # lowest density that is drawn, relative to the highest in the figure


def curve(found: Measurement) -> tuple[Array, Array]:
    """Ascending eigenvalues and the density there, smoothed by the record's Gaussian kernel."""
    nodes, weights, sigma = found.nodes.numpy(), found.weights.numpy(), found.sigma
    low, high = nodes[0] - REACH * sigma, nodes[-1] + REACH * sigma
    near = (nodes[:, None] + sigma * np.linspace(-REACH, REACH, 15)).ravel()  # resolves every peak
    grid = np.unique(np.concatenate((np.linspace(low, high, POINTS), near)))
    kernel = np.exp(-0.5 * ((grid[:, None] - nodes) / sigma) ** 2)
    values = kernel @ weights / (sigma * np.sqrt(2 * np.pi))
    drawn = values > 1e-3 * FLOOR * values.max()
    drawn |= np.roll(drawn, 1) | np.roll(drawn, -1)  # the ends of each piece lie below the figure
    return grid[drawn], values[drawn]


def _at_the_end(selection: Selection) -> Iterator[style.Sketch]:
    """One figure per depth: a panel per variant, both kinds of statistics in one panel."""
    for depth in selection.depths:
        networks = [n for n in selection.networks if n.depth == depth and selection.last(n, "eval")]
        if not networks:
            continue
        columns = min(len(networks), 2)
        fig, axes = style.grid(-(-len(networks) // columns), columns, 4.2, 2.3, sharey=True)
        highest = 0.0
        for ax, network in zip(style.flat(axes), networks, strict=False):
            look = style.LOOKS[network.variant]
            for mode in selection.modes:
                rows = selection.last(network, mode)
                if not rows or (mode == "train" and not network.has_batch_norm):
                    continue
                grid, values = curve(rows[0])
                highest = max(highest, float(values.max()))
                if mode == "eval":
                    ax.fill_between(grid, values, 0, color=look.colour, alpha=0.25, linewidth=0)
                ax.plot(grid, values, color=look.colour, lw=1.2, ls="-" if mode == "eval" else ":")
            style.panel(ax, _title(network, selection.last(network, "eval")[0]), *LABELS)
        _logarithmic(axes, len(networks), highest)
        yield style.Sketch(
            f"{AT_END.name}-depth{depth}",
            f"{AT_END.title}, depth {depth}",
            f"Density of the eigenvalues after epoch {selection.end}, first seed, smoothed by a "
            "Gaussian. Solid and filled: running statistics; dotted: batch statistics. The "
            "horizontal axes differ; each title gives the largest eigenvalue (solid curve).",
            fig,
        )


def _over_epochs(selection: Selection) -> Iterator[style.Sketch]:
    """One figure per depth and statistics: a panel per variant, a curve per epoch."""
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    for mode in selection.modes:
        for depth in selection.depths:
            networks = [n for n in selection.networks if n.depth == depth]
            networks = [n for n in networks if len(selection.by_epoch(n, mode)) > 1]
            if not networks:
                continue
            epochs = style.spread({e for n in networks for e in selection.by_epoch(n, mode)})
            colours = colormaps["viridis"](np.linspace(0.0, 0.9, len(epochs)))
            columns = min(len(networks), 2)
            fig, axes = style.grid(-(-len(networks) // columns), columns, 4.2, 2.3, sharey=True)
            highest = 0.0
            for ax, network in zip(style.flat(axes), networks, strict=False):
                found = selection.by_epoch(network, mode)
                for epoch, colour in zip(epochs, colours, strict=True):
                    if epoch in found:
                        grid, values = curve(found[epoch][0])
                        highest = max(highest, float(values.max()))
                        ax.plot(grid, values, color=colour, linewidth=1.1)
                last = list(found.values())[-1][0]
                style.panel(ax, _title(network, last), *LABELS)
            _logarithmic(axes, len(networks), highest)
            entries = [
                Line2D([], [], color=colour, label="before training" if e == 0 else f"epoch {e}")
                for e, colour in zip(epochs, colours, strict=True)
            ]
            style.legend(fig, entries)
            yield style.Sketch(
                f"{OVER_EPOCHS.name}-depth{depth}-{mode}",
                f"{OVER_EPOCHS.title}, depth {depth}, {MODES[mode]}",
                "Density of the eigenvalues, first seed, smoothed by a Gaussian. The horizontal "
                "axes differ; each title gives the largest eigenvalue at the last epoch.",
                fig,
            )


def _title(network: Network, found: Measurement) -> str:
    return f"{name_of(network)}: largest {number(float(found.top[0]))}"


def _logarithmic(axes: style.Panels, used: int, highest: float) -> None:
    """Logarithmic axes for the panels in use; the others vanish."""
    for place, ax in enumerate(style.flat(axes)):
        ax.set_visible(place < used)
        ax.set_yscale("log")
        ax.set_ylim(FLOOR * highest, 3 * highest)
        if place % len(axes[0]):
            ax.set_ylabel("")


AT_END: Kind = Kind(
    "density",
    "Spectral density at the end of training",
    "3, A.11-A.17",
    "any depths and variants, measured after the last epoch",
    no_end,
    _at_the_end,
)
OVER_EPOCHS: Kind = Kind(
    "density-epochs",
    "Spectral density over the epochs",
    "3, A.11-A.17",
    "any depths and variants, measured at two epochs or more",
    no_two_epochs,
    _over_epochs,
)
