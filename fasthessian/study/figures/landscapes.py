"""The loss along the first two eigenvectors, at the end of training and over the epochs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fasthessian.results.plots import round_numbers
from fasthessian.results.records import Landscape
from fasthessian.study.figures import style
from fasthessian.study.figures.kind import Kind
from fasthessian.study.networks import Network
from fasthessian.study.select import MODES, Selection
from fasthessian.study.text import name_of

if TYPE_CHECKING:
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

LEVELS = 22
MOST_LOSS = 100.0  # that is drawn; guessing among 10 classes has 2.3


def surfaces(selection: Selection, network: Network, mode: str) -> Mapping[int, Landscape]:
    """The landscapes of the first seed that has any, by epoch."""
    mode = mode if network.has_batch_norm else "eval"
    for training in selection.trainings.get(network, []):
        found = {
            epoch: landscape
            for (run, epoch, kind), landscape in selection.study.landscapes.items()
            if run == training.run and kind == mode and _drawable(landscape)
        }
        if found:
            return dict(sorted(found.items()))
    return {}


def _drawable(landscape: Landscape) -> bool:
    return landscape.losses.ndim == 2 and bool(landscape.losses.isfinite().any())


def _at_the_end(selection: Selection) -> Iterator[style.Sketch]:
    """One figure per statistics: rows are depths, columns variants, surfaces in perspective."""
    for mode in selection.modes:
        found = {n: list(surfaces(selection, n, mode).items())[-1:] for n in selection.networks}
        found = {network: rows for network, rows in found.items() if rows}
        if not found:
            continue
        depths = sorted({network.depth for network in found})
        variants = [v for v in selection.variants if any(n.variant == v for n in found)]
        columns = min(len(variants), 4)
        places = [(d, v) for d in depths for v in variants]
        fig, axes = style.grid(
            -(-len(places) // columns), columns, 2.6, 2.3, subplot_kw={"projection": "3d"}
        )
        end = max(rows[0][0] for rows in found.values())
        scale = _scale([rows[0][1] for rows in found.values()])
        for ax, (depth, variant) in zip(style.flat(axes), places, strict=False):
            rows = found.get(Network(depth, variant))
            if rows:
                _surface(ax, rows[0][1], scale)
                early = f" (epoch {rows[0][0]})" * (rows[0][0] != end)
                ax.set_title(name_of(Network(depth, variant)) + early, fontsize=8, y=1.0)
            else:
                ax.remove()
        for ax in style.flat(axes)[len(places) :]:
            ax.remove()
        _colour_bar(fig, scale)
        yield style.Sketch(
            f"{AT_END.name}-{mode}",
            f"{AT_END.title}, {MODES[mode]}",
            f"After epoch {end}. Height and colour are the loss on the images of the spectrum, on "
            "one logarithmic scale for all panels; steps along unit eigenvectors, first seed.",
            fig,
        )


def _over_epochs(selection: Selection) -> Iterator[style.Sketch]:
    """One figure per depth and statistics: rows are variants, columns epochs, contours."""
    for mode in selection.modes:
        for depth in selection.depths:
            found = {n: surfaces(selection, n, mode) for n in selection.networks}
            found = {n: rows for n, rows in found.items() if n.depth == depth and len(rows) > 1}
            if not found:
                continue
            epochs = style.spread({epoch for rows in found.values() for epoch in rows})
            fig, axes = style.grid(len(found), len(epochs), 2.1, 1.75)
            scale = _scale([x for rows in found.values() for x in rows.values()])
            for (network, rows), line in zip(found.items(), axes, strict=True):
                for epoch, ax in zip(epochs, line, strict=True):
                    if epoch in rows:
                        _contours(ax, rows[epoch], scale)
                    else:
                        ax.set_xticks([])
                        ax.set_yticks([])
                        ax.text(0.5, 0.5, "not computed", ha="center", va="center", fontsize=7)
                    if ax in axes[0]:
                        ax.set_title(f"epoch {epoch}" if epoch else "before training", fontsize=9)
                    ax.tick_params(labelsize=7)
                line[0].set_ylabel(style.LOOKS[network.variant].label, fontsize=9)
            fig.supxlabel("step along eigenvector 1", fontsize=8)
            fig.supylabel("step along eigenvector 2", fontsize=8)
            _colour_bar(fig, scale)
            yield style.Sketch(
                f"{OVER_EPOCHS.name}-depth{depth}-{mode}",
                f"{OVER_EPOCHS.title}, depth {depth}, {MODES[mode]}",
                "Loss on the images of the spectrum, on one logarithmic scale for all panels; "
                "steps along unit eigenvectors of the same epoch, first seed.",
                fig,
            )


class Range(NamedTuple):
    """Lowest and highest loss of a scale."""

    low: float
    high: float

    def norm(self) -> Normalize:
        """The scale of the colours."""
        from matplotlib.colors import LogNorm

        return LogNorm(*self)

    def clipped(self, landscape: Landscape) -> Any:
        """The losses within the scale; those that are not finite are at its upper end."""
        losses = landscape.losses.numpy()
        return np.where(np.isfinite(losses), losses, np.inf).clip(*self)


def _scale(found: list[Landscape]) -> Range:
    """One logarithmic scale for all; a loss above MOST_LOSS is drawn as that."""
    losses = np.concatenate([x.losses.numpy().ravel() for x in found])
    losses = losses[np.isfinite(losses) & (losses > 0)]
    low = float(losses.min()) if len(losses) else 1.0
    high = float(losses.max()) if len(losses) else 1.0
    return Range(low, max(min(high, MOST_LOSS), 1.01 * low))


def _surface(ax: Any, landscape: Landscape, scale: Range) -> None:
    from matplotlib import colormaps

    x, y = np.meshgrid(landscape.alphas.numpy(), landscape.betas.numpy(), indexing="ij")
    losses = scale.clipped(landscape)
    drawn = ax.plot_surface(
        x,
        y,
        np.log10(losses),
        facecolors=colormaps["viridis"](scale.norm()(losses)),
        rcount=60,
        ccount=60,
        linewidth=0,
        antialiased=False,
        shade=False,
    )
    drawn.set_rasterized(True)
    low, high = np.log10(scale.low), np.log10(scale.high)
    ax.set_zlim(low, high)
    ticks = round_numbers(*scale)
    ax.set_zticks(np.log10(ticks), [f"{tick:g}" for tick in ticks])
    ax.set_xlabel("vector 1", fontsize=7, labelpad=-6)
    ax.set_ylabel("vector 2", fontsize=7, labelpad=-6)
    ax.tick_params(labelsize=6, pad=-2)
    ax.locator_params(axis="x", nbins=4)
    ax.locator_params(axis="y", nbins=4)
    ax.view_init(elev=28, azim=-55)
    ax.set_box_aspect((1, 1, 0.8), zoom=1.1)


def _contours(ax: Any, landscape: Landscape, scale: Range) -> None:
    x, y = landscape.alphas.numpy(), landscape.betas.numpy()
    losses = scale.clipped(landscape).T
    levels = np.geomspace(*scale, LEVELS)
    ax.contourf(x, y, losses, levels, cmap="viridis", norm=scale.norm(), extend="both")
    ax.contour(x, y, losses, levels[::3], colors="white", linewidths=0.4, alpha=0.6)
    ax.set_box_aspect(1)
    ax.locator_params(nbins=3)
    ax.plot(0, 0, "o", color="white", markeredgecolor="black", markersize=3.5)


def _colour_bar(fig: Figure, scale: Range) -> None:
    from matplotlib.cm import ScalarMappable

    bar = fig.colorbar(ScalarMappable(scale.norm(), "viridis"), ax=fig.axes, shrink=0.7, pad=0.03)
    bar.set_label("loss (log scale)", fontsize=9)
    bar.minorticks_off()
    ticks = round_numbers(*scale)
    bar.set_ticks(list(ticks), labels=[f"{tick:g}" for tick in ticks])
    bar.ax.tick_params(labelsize=8)


def _no_landscape(selection: Selection) -> str:
    for network in selection.networks:
        if any(surfaces(selection, network, mode) for mode in MODES):
            return ""
    return "no landscape along two eigenvectors was computed"


def _no_two(selection: Selection) -> str:
    for network in selection.networks:
        if any(len(surfaces(selection, network, mode)) > 1 for mode in MODES):
            return ""
    return "no network has landscapes at two epochs"


AT_END: Kind = Kind(
    "landscape",
    "Loss landscape at the end of training",
    "1, A.18-A.24",
    "any depths and variants; the landscape after the last epoch",
    _no_landscape,
    _at_the_end,
)
OVER_EPOCHS: Kind = Kind(
    "landscape-epochs",
    "Loss landscape over the epochs",
    "1, A.18-A.24",
    "any depths and variants; landscapes at two epochs or more",
    _no_two,
    _over_epochs,
)
