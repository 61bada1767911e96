"""What a trace depends on besides the network: statistics, training loss, weights, accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from fasthessian.results.plots import GREY
from fasthessian.study import compare
from fasthessian.study.figures import style
from fasthessian.study.figures.kind import Kind, no_end, no_two_epochs
from fasthessian.study.intervals import Difference, spearman
from fasthessian.study.networks import Network
from fasthessian.study.records import Measurement
from fasthessian.study.select import MODES, Selection, Value, top, trace
from fasthessian.study.text import name_of

if TYPE_CHECKING:
    from matplotlib.lines import Line2D

QUANTITIES = ((trace, "trace of the Hessian"), (top, "largest eigenvalue"))


def _modes(selection: Selection) -> Iterator[style.Sketch]:
    """Running and batch statistics of each network, joined by a line."""
    networks = [n for n in selection.networks if selection.last(n, "eval")]
    fig, axes = style.grid(1, 2, 3.9, 0.9 + 0.32 * len(networks), sharey=True)
    for ax, (quantity, label) in zip(axes[0], QUANTITIES, strict=True):
        everything: list[float] = []
        for place, network in enumerate(networks):
            found = {}
            for mode in ("eval", "train") if network.has_batch_norm else ("eval",):
                rows = selection.last(network, mode)
                if not rows:
                    continue
                found[mode] = value = style.over_seeds(map(quantity, rows))
                everything += value
                look = style.drawn_as(network, mode, selection) | {"linestyle": ""}
                shift = {"eval": -0.12, "train": 0.12}[mode] if network.has_batch_norm else 0.0
                ax.errorbar(value.value, place + shift, xerr=style.errors([value]), **look)
            if len(found) == 2:
                ends = [found["eval"].value, found["train"].value]
                ax.plot(ends, [place - 0.12, place + 0.12], color=GREY, lw=0.8, zorder=0)
        ax.set_yticks(range(len(networks)), [name_of(n) for n in networks])
        style.panel(ax, label, f"{label} (log scale)")
        style.scale(ax, everything, "x")
    axes[0][0].invert_yaxis()
    style.legend(fig, style.handles(selection, networks, modes=True))
    yield style.Sketch(
        STATISTICS.name,
        STATISTICS.title,
        f"After epoch {selection.end}: mean over seeds; a bar contains the interval of every seed. "
        "Filled: running statistics, as at test time; open: the statistics of each batch, as "
        "during training. Networks without batch normalisation have one value.",
        fig,
    )


def _against(
    kind: Callable[[], Kind], read: Callable[[Measurement], float], label: str, what: str
) -> Callable[[Selection], Iterator[style.Sketch]]:
    """The function that draws trace and largest eigenvalue against another number."""

    def sketch(selection: Selection) -> Iterator[style.Sketch]:
        modes = selection.modes
        fig, axes = style.grid(len(modes), 2, 4.2, 3.0, sharex=True, sharey="col")
        seen: list[list[float]] = [[], []]
        across: list[float] = []
        for mode, row in zip(modes, axes, strict=True):
            for ax, (quantity, name), values in zip(row, QUANTITIES, seen, strict=True):
                for network in selection.networks:
                    found = selection.by_epoch(network, mode)
                    found = {epoch: rows for epoch, rows in found.items() if epoch > 0}
                    if not found:
                        continue
                    x = [style.middle([read(m) for m in rows]) for rows in found.values()]
                    y = [style.over_seeds(map(quantity, rows)).value for rows in found.values()]
                    look = style.drawn_as(network, mode, selection)
                    ax.plot(x, y, markevery=[-1], alpha=0.9, **look)
                    ax.plot(x[:-1], y[:-1], ".", color=look["color"], markersize=4)
                    values += y
                    across += x
                style.panel(ax, MODES[mode], label * (mode == modes[-1]), name)
        for row in axes:
            for ax, values in zip(row, seen, strict=True):
                style.scale(ax, values)
                style.scale(ax, across, "x")
        networks = selection.networks
        style.legend(fig, style.handles(selection, networks, depths=True, modes=True))
        yield style.Sketch(
            kind().name,
            kind().title,
            f"One line per network through its checkpoints after the start (dots), to the last one "
            f"(marker); mean over seeds. {what}",
            fig,
        )

    return sketch


def _equal_loss(selection: Selection) -> Iterator[style.Sketch]:
    """Ratios to the ResNet of the same depth: at the end, and at equal training loss."""
    networks = _changed(selection)
    fig, axes = style.grid(
        1, len(selection.modes), 3.9, 1.0 + 0.36 * len(networks), sharex=True, sharey=True
    )
    for ax, mode in zip(axes[0], selection.modes, strict=True):
        ax.axvline(1, color=GREY, linewidth=0.9)
        everything = [1.0]
        for place, network in enumerate(networks):
            base = compare.base_of(network)
            reached = compare.ratio_at_loss(selection, network, base, mode, trace)
            pair = (compare.ratio(selection, network, base, mode, trace), reached and reached.ratio)
            for shift, marker, found in zip((-0.14, 0.14), ("o", "*"), pair, strict=True):
                if found is not None:
                    value = _exponential(found)
                    everything += value
                    look = style.drawn_as(network, mode, selection)
                    size = 9 if marker == "*" else 5
                    look |= {"linestyle": "", "marker": marker, "markersize": size}
                    bars = style.errors([value])
                    ax.errorbar(value.value, place + shift, xerr=bars, elinewidth=0.9, **look)
        ax.set_yticks(range(len(networks)), [name_of(n) for n in networks])
        style.panel(ax, MODES[mode], "trace / trace of the ResNet of the same depth")
        style.scale(ax, everything, "x")
    axes[0][0].invert_yaxis()
    style.legend(fig, _points())
    yield style.Sketch(
        EQUAL_LOSS.name,
        EQUAL_LOSS.title,
        "Trace relative to the ResNet of the same depth, after the last epoch and where both have "
        "the same training loss: the lowest that all their seeds reach. log trace is interpolated "
        "linearly in log loss between checkpoints. Bars: 95 % intervals over seeds (Welch); with "
        "one seed, over random probes only.",
        fig,
    )


def _points() -> list[Line2D]:
    from matplotlib.lines import Line2D

    pairs = (("o", "after the last epoch"), ("*", "at equal training loss"))
    return [Line2D([], [], color=GREY, ls="", marker=m, label=label) for m, label in pairs]


def _exponential(found: Difference) -> Value:
    """A ratio from its logarithm; the ends stay within what a figure can show."""
    ends = (found.value, max(found.low, found.value - 7), min(found.high, found.value + 7))
    return Value(*(math.exp(x) for x in ends))


def _correlation(selection: Selection) -> Iterator[style.Sketch]:
    """Trace against the accuracy that was lost, one point per network."""
    fig, axes = style.grid(1, len(selection.modes), 4.2, 3.3, sharex=True, sharey=True)
    for ax, mode in zip(axes[0], selection.modes, strict=True):
        pairs, everything = [], [1.0]
        for network in _changed(selection):
            base = compare.base_of(network)
            lost = compare.loss_of_accuracy(selection, network)
            found = compare.ratio(selection, network, base, mode, trace)
            if lost is None or found is None:
                continue
            pairs.append((lost.value, found.value))
            value = _exponential(found)
            everything.append(value.value)
            look = style.drawn_as(network, mode, selection) | {"linestyle": ""}
            ax.plot(lost.value, value.value, **look | {"markersize": 7})
            ax.annotate(str(network.depth), (lost.value, value.value), fontsize=7,
                        xytext=(6, 4), textcoords="offset points")  # fmt: skip
        ax.axhline(1, color=GREY, linewidth=0.8)
        ax.axvline(0, color=GREY, linewidth=0.8)
        found = spearman([p[0] for p in pairs], [p[1] for p in pairs])
        words = (
            f"rank correlation {found.value:.2f} ({found.low:.2f} to {found.high:.2f})"
            if found
            else "too few networks for a correlation"
        )
        style.panel(
            ax,
            f"{MODES[mode]}\n{words}",
            "accuracy lost against ResNet (points)",
            "trace / trace of ResNet" * (ax is axes[0][0]),
        )
        style.scale(ax, everything)
        ax.margins(0.09)
    style.legend(fig, style.handles(selection, _changed(selection), modes=True))
    yield style.Sketch(
        CORRELATION.name,
        CORRELATION.title,
        "One point per network, with its depth beside it: mean over seeds, relative to the ResNet "
        "of the same depth. Rank correlation (Spearman) with its 95 % interval over networks.",
        fig,
    )


def _changed(selection: Selection) -> list[Network]:
    """Networks with a part removed whose ResNet of the same depth is in the study too."""
    found = [n for n in selection.networks if n.variant != "resnet"]
    return [n for n in found if compare.ratio(selection, n, compare.base_of(n), "eval", trace)]


def _no_pair(selection: Selection) -> str:
    return "" if _changed(selection) else "no depth has both ResNet and another variant at the end"


def _no_batch(selection: Selection) -> str:
    for network in selection.networks:
        if network.has_batch_norm and selection.last(network, "train"):
            return no_end(selection)
    return "no network with batch normalisation was measured with batch statistics"


STATISTICS: Kind = Kind(
    "statistics",
    "Running against batch statistics of batch normalisation",
    "",
    "a variant with batch normalisation, measured with both kinds of statistics after the last "
    "epoch",
    _no_batch,
    _modes,
)
LOSS: Kind = Kind(
    "against-loss",
    "Curvature against training loss",
    "",
    "any depths and variants, measured at two epochs or more",
    no_two_epochs,
    _against(
        lambda: LOSS,
        lambda m: m.loss,
        "training loss",
        "Networks differ in curvature at equal loss where their lines are apart on one vertical.",
    ),
)
NORM: Kind = Kind(
    "against-norm",
    "Curvature against the norm of the weights",
    "",
    "any depths and variants, measured at two epochs or more",
    no_two_epochs,
    _against(
        lambda: NORM,
        lambda m: m.weight_norm,
        "norm of all weights",
        "Under cross-entropy, larger weights alone can make the curvature small (Granziol 2020).",
    ),
)
EQUAL_LOSS: Kind = Kind(
    "equal-loss",
    "Trace relative to ResNet, at the end and at equal training loss",
    "",
    "resnet and another variant at one depth; three epochs or more",
    _no_pair,
    _equal_loss,
)
CORRELATION: Kind = Kind(
    "correlation",
    "Trace against loss of accuracy",
    "4 with Tables II, III",
    "resnet and other variants, measured after the last epoch; four or more for a correlation",
    _no_pair,
    _correlation,
)
