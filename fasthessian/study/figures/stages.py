"""The trace of each stage."""

from __future__ import annotations

from collections.abc import Iterator

from fasthessian.results.plots import GREY
from fasthessian.study.figures import style
from fasthessian.study.figures.kind import Kind, no_end
from fasthessian.study.networks import Network
from fasthessian.study.select import MODES, Selection, Value, stage


def _stages(selection: Selection) -> Iterator[style.Sketch]:
    modes, depths = selection.modes, selection.depths
    names = _names(selection)
    fig, axes = style.grid(len(modes), len(depths), 4.6, 2.9, sharex=True, sharey=True)
    everything: list[float] = []
    for mode, row in zip(modes, axes, strict=True):
        for depth, ax in zip(depths, row, strict=True):
            networks = [n for n in selection.networks if n.depth == depth]
            networks = [n for n in networks if selection.last(n, mode)]
            for place, network in enumerate(networks):
                values = _of_stages(selection, network, mode, names)
                everything += [x for value in values for x in value]
                look = style.LOOKS[network.variant]
                filled = mode == "eval" or not network.has_batch_norm
                width = 0.82 / len(networks)
                ax.bar(
                    [at - 0.41 + (place + 0.5) * width for at in range(len(names))],
                    [value.value for value in values],
                    width,
                    yerr=style.errors(values),
                    facecolor=look.colour if filled else "white",
                    edgecolor=look.colour,
                    linewidth=1.1,
                    error_kw={"elinewidth": 0.9, "ecolor": GREY, "capsize": 1.5},
                )
            ax.set_xticks(range(len(names)), [name.replace("stage", "stage ") for name in names])
            title = f"depth {depth}, {MODES[mode]}"
            style.panel(ax, title, y="trace of the stage" * (ax is row[0]))
            ax.grid(False, axis="x")
    for ax in style.flat(axes):
        style.scale(ax, everything)
    style.legend(fig, style.handles(selection, selection.networks))
    yield style.Sketch(
        STAGES.name,
        STAGES.title,
        f"Trace of the diagonal block of each stage after epoch {selection.end}: mean over seeds; "
        "a bar of error contains the 95 % interval of every seed. Open bars: batch statistics.",
        fig,
    )


def _of_stages(
    selection: Selection, network: Network, mode: str, names: tuple[str, ...]
) -> list[Value]:
    rows = selection.last(network, mode)
    return [style.over_seeds(stage(row, name) for row in rows) for name in names]


def _names(selection: Selection) -> tuple[str, ...]:
    """The stages that every network has."""
    for network in selection.networks:
        for row in selection.last(network, "eval"):
            return row.stages
    return ()


STAGES: Kind = Kind(
    "stages",
    "Trace of each stage at the end of training",
    "4, A.8, A.10",
    "any depths and variants, measured after the last epoch; the paper removes batch "
    "normalisation or residual connections from stage 1, 2 or 3",
    no_end,
    _stages,
)
