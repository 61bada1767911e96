"""Figures of a study: every kind is made, in valid files, with the numbers of the records."""

import dataclasses
import io
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch

from fasthessian.results.records import Landscape
from fasthessian.study.figures import (
    KINDS,
    comparisons,
    curves,
    densities,
    draw,
    landscapes,
    missing,
    stages,
    style,
)
from fasthessian.study.networks import VARIANTS, Network
from fasthessian.study.records import DIVERGED, Study
from fasthessian.study.select import Selection
from tests.support.synthetic_study import PLANTS, Plant, synthetic

EMPTY = Study({}, (), (), {})


@pytest.fixture(scope="module")
def small():
    """Two networks, with landscapes for running statistics alone."""
    study = synthetic(depths=(20,), variants=("resnet", "no-bn"), epochs=(0, 2, 4))
    found = {key: row for key, row in study.landscapes.items() if key[2] == "eval"}
    return dataclasses.replace(study, landscapes=found)


@pytest.fixture(scope="module")
def drawn(small):
    return list(draw(small))


def sketched(kind, study):
    """The drawings of one kind, by name."""
    return {sketch.name: sketch.drawing for sketch in kind.sketch(Selection(study))}


def lines(drawing, colour):
    """The data of all lines of a colour, as arrays (2, points)."""
    found = [line for ax in drawing.axes for line in ax.get_lines()]
    return [np.array(line.get_data()) for line in found if line.get_color() == colour]


def test_every_kind_is_made_under_a_name_of_its_own(small, drawn):
    names = (
        "testing-curves trace top-eigenvalue stages density density-epochs landscape "
        "landscape-epochs statistics against-loss against-norm equal-loss correlation "
        "edge-of-stability"
    )
    assert names.split() == list(dict.fromkeys(f.kind for f in drawn))
    assert names.split() == [kind.name for kind in KINDS]
    assert len({figure.name for figure in drawn}) == len(drawn)
    assert all(figure.name.startswith(figure.kind) for figure in drawn)
    assert missing(small) == {}
    assert all(kind.title and kind.needs for kind in KINDS)


def test_a_figure_of_the_paper_is_named_in_the_caption(drawn):
    papers = {kind.name: kind.paper for kind in KINDS}
    for figure in drawn:
        words = f"(paper: Figure {papers[figure.kind]})"
        assert (words in figure.caption) == bool(papers[figure.kind])


def test_the_files_are_valid_small_and_undated(drawn):
    from PIL import Image

    for figure in drawn:
        with Image.open(io.BytesIO(figure.png)) as image:
            image.load()
            assert image.format == "PNG" and min(image.size) > 200
        assert len(figure.png) <= style.MOST_BYTES
        root = ET.fromstring(figure.svg)
        texts = [node for node in root.iter() if node.tag.endswith("}text")]
        assert len(texts) > 3, "text must stay text"
        assert b"dc:date" not in figure.svg and b"Matplotlib v" not in figure.svg


def test_a_large_picture_gets_a_palette_and_then_fewer_dots(monkeypatch):
    from PIL import Image

    monkeypatch.setattr(style, "MOST_BYTES", 12_000)
    drawing, axes = style.grid(1, 1, 1.0, 1.0)
    axes[0][0].imshow(np.random.default_rng(0).random((40, 40)))
    png, _ = style.files(drawing)
    with Image.open(io.BytesIO(png)) as image:
        assert image.mode == "P" and image.size[0] < style.DPI * drawing.get_figwidth()


def test_the_same_study_gives_the_same_bytes_and_no_global_state_changes(small, drawn):
    import matplotlib
    from matplotlib import pyplot

    before, shown = dict(matplotlib.rcParams), pyplot.get_fignums()
    again = [stages.STAGES, landscapes.AT_END]
    expected = {figure.name: (figure.png, figure.svg) for figure in drawn}
    for kind in again:
        for name, drawing in sketched(kind, small).items():
            assert style.files(drawing) == expected[name]
    assert dict(matplotlib.rcParams) == before
    assert pyplot.get_fignums() == shown


def test_what_a_study_lacks_is_said_and_not_drawn():
    one = synthetic(depths=(20,), variants=("no-bn",), epochs=(4,))
    study = dataclasses.replace(one, landscapes={}, descents=())
    reasons = missing(study)
    assert reasons == {
        "trace": "no network was measured at two epochs",
        "top-eigenvalue": "no network was measured at two epochs",
        "density-epochs": "no network was measured at two epochs",
        "landscape": "no landscape along two eigenvectors was computed",
        "landscape-epochs": "no network has landscapes at two epochs",
        "statistics": "no network with batch normalisation was measured with batch statistics",
        "against-loss": "no network was measured at two epochs",
        "against-norm": "no network was measured at two epochs",
        "equal-loss": "no depth has both ResNet and another variant at the end",
        "correlation": "no depth has both ResNet and another variant at the end",
        "edge-of-stability": "no descent was made; see --edge-of-stability",
    }
    made = {figure.name for figure in draw(study)}
    assert made == {"testing-curves", "stages", "density-depth20"}
    assert set(missing(EMPTY)) == {kind.name for kind in KINDS}
    assert missing(EMPTY)["stages"] == "no checkpoint after training was measured"


def test_each_variant_has_a_colour_and_a_marker_of_its_own():
    assert list(style.LOOKS) == list(VARIANTS)
    for field in ("label", "colour", "marker"):
        assert len({getattr(look, field) for look in style.LOOKS.values()}) == len(VARIANTS)


def test_the_trace_is_the_mean_over_seeds_with_all_intervals(small):
    drawing = sketched(curves.TRACE, small)["trace"]
    found = [m for m in small.measurements if m.variant == "no-bn" and m.epoch == 4]
    mean = np.exp(np.mean([np.log(m.trace) for m in found]))
    rows = lines(drawing, style.LOOKS["no-bn"].colour)
    values = [row for row in rows if row[0].tolist() == [0, 2, 4] and row[1, -1] == mean]
    assert len(values) == 2  # without batch normalisation both kinds of statistics are the same
    ends = [row[1, -1] for row in rows if row[0].tolist() == [0, 2, 4]]
    assert min(m.trace_interval[0] for m in found) == pytest.approx(min(ends))
    assert max(m.trace_interval[1] for m in found) == pytest.approx(max(ends))
    assert all(ax.get_yscale() == "log" for ax in drawing.axes)


def test_open_markers_stand_for_batch_statistics(small):
    above, below = sketched(curves.TRACE, small)["trace"].axes
    colour = style.LOOKS["resnet"].colour

    def faces(ax):
        rows = [line for line in ax.get_lines() if line.get_marker() in "os"]
        return {line.get_color(): line.get_markerfacecolor() for line in rows}

    assert faces(above)[colour] == colour and faces(below)[colour] == "white"
    assert faces(below)[style.LOOKS["no-bn"].colour] != "white"


def test_a_negative_trace_is_drawn_on_an_axis_that_is_linear_around_zero(small):
    first, *rest = small.measurements
    first = dataclasses.replace(first, trace=-3.0, trace_interval=(-4.0, -2.0))
    study = dataclasses.replace(small, measurements=(first, *rest))
    drawing = sketched(curves.TRACE, study)["trace"]
    assert drawing.axes[0].get_yscale() == "symlog"


def test_a_diverged_training_ends_with_a_cross():
    plants = {Network(20): Plant(), Network(20, "no-bn"): Plant(status=DIVERGED)}
    (ax,) = sketched(curves.TESTING, synthetic(plants, epochs=(4,)))["testing-curves"].axes
    crosses = [line for line in ax.get_lines() if line.get_marker() == "x"]
    assert [line.get_color() for line in crosses] == [style.LOOKS["no-bn"].colour]


def test_bars_of_stages_have_the_planted_heights(small):
    drawing = sketched(stages.STAGES, small)["stages"]
    heights = [bar.get_height() for bar in drawing.axes[0].patches]
    found = [m for m in small.measurements if m.epoch == 4 and m.mode == "eval"]
    traces = torch.stack([m.stage_traces for m in found if m.variant == "resnet"])
    np.testing.assert_allclose(heights[:5], traces.log().mean(0).exp())


def test_a_density_has_mass_one_and_the_mean_of_its_nodes(small):
    found = small.measurements[-1]
    grid, values = densities.curve(found)
    assert np.trapezoid(values, grid) == pytest.approx(1.0, abs=2e-3)
    mean = float(found.nodes @ found.weights)
    scale = float(found.top[0])
    assert np.trapezoid(values * grid, grid) == pytest.approx(mean, abs=2e-3 * scale)


def test_all_landscapes_of_a_figure_share_one_scale(small):
    drawing = sketched(landscapes.OVER_EPOCHS, small)["landscape-epochs-depth20-eval"]
    norms = [c.norm for ax in drawing.axes for c in ax.collections if c.norm.vmin != c.norm.vmax]
    filled = {(norm.vmin, norm.vmax) for norm in norms if type(norm).__name__ == "LogNorm"}
    losses = [row.losses for (_, _, mode), row in small.landscapes.items() if mode == "eval"]
    lowest, highest = min(map(torch.amin, losses)), max(map(torch.amax, losses))
    assert filled == {(float(lowest), float(highest))}
    surfaces = sketched(landscapes.AT_END, small)["landscape-eval"].axes
    assert len({ax.get_zlim() for ax in surfaces if hasattr(ax, "get_zlim")}) == 1


def test_losses_that_are_not_finite_are_drawn_at_the_upper_end(small):
    steps = torch.linspace(-1, 1, 3).double()
    losses = torch.ones(3, 3).double()
    losses[0, 0], losses[1, 1] = float("inf"), 0.5
    scale = landscapes._scale([Landscape(steps, steps, losses)])
    assert scale == (0.5, 1.0)
    assert landscapes._scale([Landscape(steps, steps, 1e6 * losses.clamp(max=1))]).low == 5e5
    assert (
        landscapes._scale([Landscape(steps, steps, losses * torch.tensor([1, 9, 900]))])[1] == 100
    )
    assert scale.clipped(Landscape(steps, steps, losses))[0, 0] == 1.0


def test_ratios_at_the_end_are_those_that_were_planted():
    study = synthetic(depths=(20,), variants=("resnet", "no-bn"))
    drawing = sketched(comparisons.EQUAL_LOSS, study)["equal-loss"]
    points = [p for p in lines(drawing, style.LOOKS["no-bn"].colour) if p.shape == (2, 1)]
    ratio = PLANTS[Network(20, "no-bn")].trace / PLANTS[Network(20)].trace
    assert points[0][0, 0] == pytest.approx(ratio)
    assert points[1][0, 0] > ratio * 1.1  # the ResNet has a smaller trace at the higher loss


def test_the_correlation_of_the_planted_networks_is_in_the_title():
    study = synthetic(epochs=(4,))
    drawing = sketched(comparisons.CORRELATION, study)["correlation"]
    assert "rank correlation 0.60" in drawing.axes[0].get_title()
    few = synthetic(depths=(20,), epochs=(4,))
    drawing = sketched(comparisons.CORRELATION, few)["correlation"]
    assert "too few networks" in drawing.axes[0].get_title()
