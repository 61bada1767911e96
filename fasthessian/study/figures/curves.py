"""What changes over the epochs: test accuracy, trace, largest eigenvalue."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from fasthessian.study.figures import style
from fasthessian.study.figures.kind import Kind, no_two_epochs
from fasthessian.study.intervals import Quantity
from fasthessian.study.records import DIVERGED
from fasthessian.study.select import MODES, Selection, top, trace


def _testing(selection: Selection) -> Iterator[style.Sketch]:
    fig, axes = style.grid(1, len(selection.depths), 4.2, 3.4, sharey=True)
    for ax, depth in zip(axes[0], selection.depths, strict=True):
        for network in selection.networks:
            if network.depth != depth:
                continue
            look = style.LOOKS[network.variant]
            curves = [t.test_accuracy.numpy() * 100 for t in selection.trainings[network]]
            curves = [curve for curve in curves if len(curve)]
            if not curves:
                continue
            epochs = np.arange(1, min(map(len, curves)) + 1)
            rows = np.stack([curve[: len(epochs)] for curve in curves])
            line = {"color": look.colour, "linestyle": style.line_of(depth, selection)}
            ax.fill_between(
                epochs, rows.min(0), rows.max(0), color=look.colour, alpha=0.15, linewidth=0
            )
            ax.plot(epochs, rows.mean(0), linewidth=1.3, **line)
            last = rows.mean(0)[-1]
            stopped = DIVERGED in selection.statuses(network)
            ax.plot(epochs[-1], last, "x" if stopped else look.marker, color=look.colour, ms=5)
        style.whole_epochs(ax)
        style.panel(ax, f"depth {depth}", "epoch", "test accuracy (%)" * (ax is axes[0][0]))
    style.legend(fig, style.handles(selection, selection.networks))
    yield style.Sketch(
        TESTING.name,
        TESTING.title,
        "Accuracy on the test images after each epoch, in eval mode: the mean over seeds, and a "
        "band from the lowest to the highest seed. A cross ends a training that diverged.",
        fig,
    )


def _over_epochs(
    kind: Callable[[], Kind], quantity: Quantity, label: str, interval: str
) -> Callable[[Selection], Iterator[style.Sketch]]:
    """The function that draws a quantity over the epochs, one panel per depth and statistics."""

    def sketch(selection: Selection) -> Iterator[style.Sketch]:
        modes, depths = selection.modes, selection.depths
        fig, axes = style.grid(len(modes), len(depths), 4.2, 3.0, sharex=True, sharey=True)
        everything: list[float] = []
        for mode, row in zip(modes, axes, strict=True):
            for depth, ax in zip(depths, row, strict=True):
                for network in selection.networks:
                    found = selection.by_epoch(network, mode)
                    if network.depth != depth or not found:
                        continue
                    values = [style.over_seeds(map(quantity, rows)) for rows in found.values()]
                    everything += [x for value in values for x in value]
                    ax.errorbar(
                        list(found),
                        [value.value for value in values],
                        style.errors(values),
                        capsize=2.5,
                        elinewidth=0.9,
                        **style.drawn_as(network, mode, selection),
                    )
                title = f"depth {depth}, {MODES[mode]}"
                style.panel(ax, title, "epoch" * (mode == modes[-1]), label * (ax is row[0]))
        for ax in style.flat(axes):
            style.scale(ax, everything)
            style.whole_epochs(ax)
        style.legend(fig, style.handles(selection, selection.networks, modes=True))
        yield style.Sketch(
            kind().name,
            kind().title,
            f"Mean over seeds; a bar contains the {interval} of every seed. Networks without batch "
            "normalisation are the same in both rows.",
            fig,
        )

    return sketch


def _no_training(selection: Selection) -> str:
    return "" if selection.networks else "no training has ended"


TESTING: Kind = Kind(
    "testing-curves",
    "Test accuracy over the epochs",
    "A.6, A.7",
    "trainings of any depths and variants",
    _no_training,
    _testing,
)
TRACE: Kind = Kind(
    "trace",
    "Trace of the Hessian over the epochs",
    "2, A.9",
    "any depths and variants, measured at two epochs or more",
    no_two_epochs,
    _over_epochs(lambda: TRACE, trace, "trace of the Hessian", "95 % interval"),
)
TOP: Kind = Kind(
    "top-eigenvalue",
    "Largest eigenvalue over the epochs",
    "",
    "any depths and variants, measured at two epochs or more",
    no_two_epochs,
    _over_epochs(lambda: TOP, top, "largest eigenvalue", "residual bound"),
)
