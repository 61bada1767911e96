"""The edge of stability: sharpness and loss along descents with constant rates."""

from __future__ import annotations

from collections.abc import Iterator

from fasthessian.study.figures import style
from fasthessian.study.figures.kind import Kind
from fasthessian.study.select import Selection

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # of Okabe, Ito 2008


def _no_descent(selection: Selection) -> str:
    return "" if selection.study.descents else "no descent was made; see --edge-of-stability"


def _sketch(selection: Selection) -> Iterator[style.Sketch]:
    records = selection.study.descents
    whole = [record for record in records if record.batch == record.images]
    parts = [record for record in records if record.batch < record.images]
    fig, ((left, middle, right),) = style.grid(1, 3, height=3.0)
    colours = {
        rate: COLOURS[i % len(COLOURS)]
        for i, rate in enumerate(dict.fromkeys(record.rate for record in records))
    }
    for record in whole:
        colour, label = colours[record.rate], f"rate 2 / {record.threshold:.3g}"
        left.axhline(record.threshold, color=colour, lw=1.0, ls="--")
        left.plot(record.steps, record.sharpness, color=colour, lw=1.3)
        middle.plot(record.steps, record.losses, color=colour, lw=1.3, label=label)
    for record in parts:
        colour = colours[record.rate]
        label = f"rate 2 / {record.threshold:.3g}, batches of {record.batch}"
        right.axhline(record.threshold, color=colour, lw=1.0, ls="--")
        right.plot(record.steps, record.sharpness, color=colour, lw=1.0, ls=":")
        right.plot(record.steps, record.batch_sharpness, color=colour, lw=1.3, label=label)
    style.panel(left, "Gradient descent: sharpness", "step", "largest eigenvalue")
    style.panel(middle, "Gradient descent: training loss", "step", "half the squared error")
    style.panel(right, "SGD: batch sharpness (sharpness dotted)", "step", "curvature")
    style.scale(middle, [float(loss) for record in whole for loss in record.losses])
    for ax in (left, right):
        ax.set_ylim(bottom=0)
    named = [*middle.get_lines(), *(x for x in right.get_lines() if x.get_label()[0] != "_")]
    style.legend(fig, named)
    yield style.Sketch(
        STABILITY.name,
        STABILITY.title,
        "A network of two hidden layers with tanh, mean squared error, one-hot targets, a constant "
        f"rate and no momentum, on {records[0].images:,} images. Dashed: 2 / rate. Gradient "
        "descent settles where the sharpness is near it, and the loss falls (Cohen et al. 2021). "
        "Under SGD it is the curvature of a batch along its own gradient that grows towards it "
        "(Andreyev and Beneventano 2024).",
        fig,
    )


STABILITY: Kind = Kind(
    "edge-of-stability",
    "Edge of stability",
    "",
    "--edge-of-stability with one rate or more",
    _no_descent,
    _sketch,
)
