import dataclasses
import itertools
import json
import math
import os
import re
from base64 import b64decode

import numpy as np
import pytest
import torch

import fasthessian as fh
from fasthessian.app.analysis import Analysis
from fasthessian.app.division import Distribution
from fasthessian.app.options import AnalysisOptions
from fasthessian.app.problems import Problem
from fasthessian.app.report import figures, folder, method, result, summary
from fasthessian.operators.checks import Check
from fasthessian.results import plots
from fasthessian.results.records import BlockSpectra, Density, Eigenpairs, Estimate, Landscape

pytest.importorskip("matplotlib")
PNG = b"\x89PNG\r\n\x1a\n"


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def gaussians(nodes, weights, grid, sigma):
    peaks = np.exp(-0.5 * ((grid - nodes[..., None]) / sigma) ** 2) / (
        sigma * math.sqrt(2 * math.pi)
    )
    return (weights[..., None] * peaks).sum(1)


def small_density(probes=2):
    nodes = np.array([[-1.0, 0.0, 9.0], [-1.1, 0.1, 9.0]])[:probes]
    weights = np.array([[0.1, 0.899, 0.001], [0.2, 0.798, 0.002]])[:probes]
    grid = np.linspace(-2, 10, 400)
    rows = gaussians(nodes, weights, grid, 0.2)
    parts = (nodes, weights, grid, rows.mean(0), rows.min(0), rows.max(0))
    return Density(*(torch.from_numpy(part) for part in parts), 0.2, 6)


def small_landscape(dimensions=2):
    alphas = torch.linspace(-1, 1, 5, dtype=torch.float64)
    if dimensions == 1:
        return Landscape(alphas, tensor(), (alphas - 0.5) ** 2)
    betas = torch.linspace(-1, 1, 7, dtype=torch.float64)
    return Landscape(alphas, betas, 0.01 + (alphas[:, None] - 0.5) ** 2 + 9 * betas**2)


def small_analysis(**changes):
    samples = tensor(9.0, 11.0, 10.0, 12.0)
    analysis = Analysis(
        parameters=1234,
        tensors=3,
        engine="retained: 1.0 MiB of graphs",
        loss=0.125,
        gradient_norm=0.5,
        top=Eigenpairs(tensor(9.0, 4.0), torch.randn(2, 5), tensor(1e-3, 2e-3), True, 20),
        bottom=Eigenpairs(tensor(-1.0), torch.randn(1, 5), tensor(0.5), False, 30),
        trace=Estimate(10.5, 0.645, (9.2, 11.8), 0.95, samples, 4, True),
        density=small_density(),
        landscape=small_landscape(),
        matvecs=60,
        notes=("bottom: <not> converged",),
        seconds={"top": 1.5},
        blocks=BlockSpectra(
            ("first <", "last"), tensor(10.0, 5.0), tensor(9.0, -2.0), tensor(0.1, 0.2),
            tensor(12.0, -3.0), tensor(1.0, 0.5),
        ),
        check=Check(1e-7, 0.0, 1e-4, 1e-3, math.nan, 1e-8, True, "symmetry ok"),
        distribution=Distribution(2, "gloo", "whole batches <2>", (1, 1), (9.0, 12.0), True),
    )  # fmt: skip
    return dataclasses.replace(analysis, **changes)


def small_result(**changes):
    problem = Problem("mine:<f>", None, None, None, {"about": "a & b", "rate": math.inf})
    return result.result_of(problem, AnalysisOptions(), small_analysis(**changes), {"total": 2.5})


def test_the_document_is_strict_json_and_gives_the_records_back():
    content = small_result().to_json()
    text = result.encode(small_result()).decode()
    assert json.loads(text, parse_constant=pytest.fail) == json.loads(text) == content
    assert content["problem"]["rate"] is None  # infinity is no JSON
    assert "vectors" not in content["top"]
    back, analysis = result.records(content), small_analysis()
    for name in result.PARTS:
        for field in dataclasses.fields(result.PARTS[name]):
            a, b = getattr(getattr(analysis, name), field.name), getattr(back[name], field.name)
            if field.name == "vectors":
                continue
            same = torch.equal(a, b) if isinstance(a, torch.Tensor) else tuple_of(a) == tuple_of(b)
            assert same or (a != a and b != b), (name, field.name)


def test_a_result_that_is_read_back_is_written_alike():
    content = small_result().to_json()
    assert result.Result.from_json(content).to_json() == content
    assert folder.files(result.Result.from_json(content)) == folder.files(small_result())


@pytest.mark.parametrize(
    ("part", "damage", "words"),
    [
        ("settings", {"steps": "many"}, "settings: steps must be an integer, got 'many'"),
        ("settings", {"span": True}, "settings: span must be a number or null, got True"),
        ("settings", {"matrix": "other"}, "--matrix other is not one of hessian, ggn, fisher"),
        ("settings", [], "settings must be an object of JSON, got a list"),
        ("problem", {"parameters": 1.5}, "parameters must be an integer, got 1.5"),
        ("timing", {"total": "long"}, "total must be a number, got 'long'"),
        ("notes", [3], "notes must be a list of text"),
        ("loss", "low", "loss must be a number, got 'low'"),
    ],
)
def test_what_is_not_a_record_is_read_strictly_too(tmp_path, part, damage, words):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(small_result().to_json() | {part: damage}))
    with pytest.raises(ValueError, match=re.escape(words)) as info:
        result.read(path)
    assert str(info.value).startswith(f"{path}: ") and "\n" not in str(info.value)


def tuple_of(value):
    return tuple(value) if isinstance(value, (list, tuple)) else value


def test_numbers_that_are_not_finite_are_null_and_read_as_nan():
    losses = small_landscape().losses.clone()
    losses[0, 0] = math.inf
    made = small_result(
        landscape=dataclasses.replace(small_landscape(), losses=losses), loss=math.nan
    )
    content = made.to_json()
    assert content["landscape"]["losses"][0][0] is None and content["loss"] is None
    back = result.records(json.loads(result.encode(made)))["landscape"]
    assert torch.isnan(back.losses[0, 0]) and back.losses.shape == losses.shape
    assert folder.files(made)["landscape.png"].startswith(PNG)
    assert lines_of(plots.plot_landscape(back), "lowest").get_xdata()[0] == 0.5


def test_only_what_was_computed_is_drawn_and_listed():
    content = small_result(bottom=None, trace=None, density=None, landscape=None, blocks=None)
    made = folder.files(content)
    assert set(made) == {"result.json", "report.html", "eigenvalues.png"}
    text = made["report.html"].decode()
    assert "Loss landscape" not in text and "<h2>Trace" not in text
    content = small_result(top=None, bottom=None, landscape=None)
    assert set(figures.figures(content)) == {"trace.png", "density.png", "blocks.png"}


def test_the_report_is_one_file_with_the_numbers_and_figures_inside():
    content = small_result()
    made = folder.files(content)
    text = made["report.html"].decode()
    assert not re.search(r"(src|href)\s*=\s*['\"](?!data:)", text) and "url(" not in text
    inside = [b64decode(x) for x in re.findall(r"base64,([^']+)'", text)]
    assert inside == [made[name] for name in figures.FIGURES]
    for words in ("10.5", "[9.2, 11.8] at 95%", "1,234 parameters", "not converged", "-1  ± 0.5",
                  "first &lt;: λ 9, trace 12 ± 1", "last: λ -2, trace -3 ± 0.5"):  # fmt: skip
        assert words in text, words
    assert "mine:&lt;f&gt;" in text and "<f>" not in text and "&lt;not&gt; converged" in text
    assert "a &amp; b" in text


def test_a_landscape_over_two_directions_is_shown_by_the_viewer():
    def shown(landscape):
        text = folder.files(small_result(landscape=landscape))["report.html"].decode()
        return [
            text.count(part)
            for part in ("<figure class='landscape'", "alt='Loss landscape'", "class Viewer")
        ]

    assert shown(small_landscape()) == [1, 1, 1]  # with the picture for browsers without scripts
    assert shown(small_landscape(1)) == [0, 1, 0]
    assert shown(None) == [0, 0, 0]


def test_the_report_says_why_steps_were_not_captured():
    made = small_result()
    assert summary.steps(made) == "" and "Lanczos steps" not in dict(method.method(made))
    graphs = {"top": "captured", "density": "eager: why", "bottom": "captured"}
    parts = {
        part: dataclasses.replace(getattr(made.analysis, part), graph=words)
        for part, words in graphs.items()
    }
    made = small_result(**parts)
    assert dict(method.method(made))["Lanczos steps"] == "captured; eager: why"
    content = made.to_json()
    del content["top"]["graph"]  # of a file written before there was the field
    assert summary.steps(result.Result.from_json(content)) == "captured; eager: why"
    assert result.records(content)["top"].graph == ""


def test_the_same_document_gives_the_same_bytes():
    assert folder.files(small_result()) == folder.files(small_result())


def test_a_new_folder_appears_whole(tmp_path):
    out = tmp_path / "a" / "report"
    folder.write(out, {"x": b"1", "y": b"2"})
    assert sorted(os.listdir(out)) == ["x", "y"] and os.listdir(tmp_path / "a") == ["report"]
    assert out.stat().st_mode & 0o700 == 0o700


def test_a_full_folder_is_kept_without_overwrite(tmp_path):
    out = tmp_path / "report"
    folder.write(out, {"result.json": b"1"})
    with pytest.raises(FileExistsError, match="is not empty; use --overwrite"):
        folder.write(out, {"result.json": b"2"})
    assert (out / "result.json").read_bytes() == b"1"


def test_overwrite_replaces_the_report_and_leaves_other_files(tmp_path):
    folder.write(tmp_path, {"result.json": b"1", "trace.png": b"old"})
    (tmp_path / "notes.txt").write_text("mine")
    folder.write(tmp_path, {"result.json": b"2"}, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["notes.txt", "result.json"]
    assert (tmp_path / "result.json").read_bytes() == b"2"


def test_a_failing_disk_leaves_everything_as_it_was(tmp_path, monkeypatch):
    out = tmp_path / "report"
    folder.write(out, {"result.json": b"1"})

    def full(path, payload):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.write_bytes", full)
        for target in (out, tmp_path / "new"):
            with pytest.raises(OSError, match="No space"):
                folder.write(target, {"result.json": b"2"}, overwrite=True)
    assert os.listdir(tmp_path) == ["report"] and os.listdir(out) == ["result.json"]
    assert (out / "result.json").read_bytes() == b"1"


def test_places_that_cannot_hold_a_report_are_found_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NotADirectoryError, match="file is a file, not a folder"):
            folder.check_folder(place)
    folder.check_folder(tmp_path / "not" / "yet")
    assert os.listdir(tmp_path) == ["file"]

    def refuse(**where):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(OSError, match="new cannot be written: Permission denied"):
        folder.check_folder(tmp_path / "new")


@pytest.mark.parametrize("content", ["not json", "[]", '{"format": "other"}'])
def test_files_that_are_not_results(tmp_path, content):
    path = tmp_path / "result.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="is not") as info:
        result.read(path)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    "damage", [{"trace": {}}, {"top": 3}, {"density": {"nodes": "x"}}, {"landscape": []}]
)
def test_a_damaged_part_is_a_value_error(damage):
    with pytest.raises(ValueError, match="is damaged"):
        result.records(small_result().to_json() | damage)


def lines_of(ax, label):
    return next(line for line in ax.lines if line.get_label().startswith(label))


def test_the_density_figure_shows_every_outlier_and_the_known_eigenvalues():
    density = small_density()
    ax = plots.plot_density(density, eigenvalues=[9.0, 4.0])
    assert ax.get_yscale() == "log"
    low, high = ax.get_ylim()
    outlier = float(density.values[density.grid > 8].max())
    assert low < outlier / 2 and high > float(density.values.max())
    assert np.array_equal(lines_of(ax, "computed").get_xdata(), [9.0, 4.0])
    assert len(lines_of(ax, "quadrature").get_xdata()) == 6
    # nodes that a breakdown repeats carry no weight and are not drawn
    weights = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64)
    broken = dataclasses.replace(small_density(1), weights=weights)
    assert len(lines_of(plots.plot_density(broken), "quadrature").get_xdata()) == 2


@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_density_floor_follows_the_scale(scale):
    d = small_density()
    scaled = dataclasses.replace(
        d, nodes=d.nodes * scale, grid=d.grid * scale, values=d.values / scale,
        lower=d.lower / scale, upper=d.upper / scale, sigma=d.sigma * scale,
    )  # fmt: skip
    low, high = np.array(plots.plot_density(scaled).get_ylim()) * scale
    assert (low, high) == pytest.approx(plots.plot_density(d).get_ylim())


def test_the_landscape_figure_marks_the_lowest_point():
    ax = plots.plot_landscape(small_landscape())
    star = lines_of(ax, "lowest")
    assert (star.get_xdata()[0], star.get_ydata()[0]) == pytest.approx((0.5, 0))
    ax = plots.plot_landscape(small_landscape(1))
    assert lines_of(ax, "lowest").get_xdata()[0] == 0.5
    flat = dataclasses.replace(small_landscape(), losses=torch.zeros(5, 7, dtype=torch.float64))
    assert figures.png(plots.plot_landscape(flat).figure).startswith(PNG)


@pytest.mark.parametrize("span", [0.0123, 0.00078, 0.55, 1.0, 123.0, 4.1e4])
def test_tick_labels_of_a_landscape_do_not_overlap(span):
    flat = small_landscape()
    ax = dataclasses.replace(flat, alphas=flat.alphas * span, betas=flat.betas * span).plot()
    ax.figure.canvas.draw()
    for axis in (ax.xaxis, ax.yaxis):
        low, high = sorted(axis.get_view_interval())
        ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        boxes = [tick.label1.get_window_extent() for tick in ticks]
        assert not any(a.overlaps(b) for a, b in itertools.pairwise(boxes))
    assert ax.yaxis.label.get_window_extent().x0 >= 0  # inside the figure


def test_the_trace_figure_ends_at_the_estimate():
    estimate = small_analysis().trace
    ax = plots.plot_estimate(estimate)
    assert lines_of(ax, "running").get_ydata()[-1] == pytest.approx(estimate.value)
    empty = dataclasses.replace(estimate, samples=tensor(), converged=False)
    assert "not reached" in plots.plot_estimate(empty).get_title()


def test_an_exact_trace_is_described_and_drawn_as_such():
    exact = Estimate(5.0, 0.0, (5.0, 5.0), 0.95, tensor(5.0), 9, True)
    made = folder.files(small_result(trace=exact))
    text = made["report.html"].decode()
    assert "exact to rounding" in text and "random vectors of signs" not in text
    assert made["trace.png"].startswith(PNG)
    assert "random vectors of signs (4)" in folder.files(small_result())["report.html"].decode()


def test_figures_draw_into_the_axes_given_and_leave_pyplot_alone():
    import sys

    fig = plots.figure()
    ax = fig.add_subplot()
    for record in (small_analysis().top, small_analysis().trace, small_density()):
        assert record.plot(ax) is ax
    many = Eigenpairs(torch.randn(40).double(), torch.zeros(40, 1), torch.rand(40), False, 9)
    assert "not converged" in many.plot().get_title()
    if "matplotlib.pyplot" in sys.modules:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()


def test_the_legend_of_a_density_hides_no_mark():
    A = fh.SymmetricOperator(lambda v: torch.linspace(-1, 1, 50).square() * v, 50)
    axes = fh.spectrum(A, (3, 3), steps=10).plot()
    axes.figure.canvas.draw()
    assert not axes.get_legend().get_window_extent().overlaps(axes.get_window_extent())
