"""A damaged result.json is refused in one line, which names the field."""

import json

import pytest

from fasthessian.app.report import figures
from fasthessian.app.report import result as report
from tests.support.result_files import BLOCKS, MEAN, refused_file

pytest.importorskip("matplotlib")

GOOD = {
    "format": report.FORMAT,
    "top": {"values": [2.0, 1.0], "residuals": [0.1, 0.1], "converged": True, "matvecs": 9},
    "trace": {**MEAN, "samples": [1.0, 2.0]},
    "density": {
        "nodes": [[0.0, 1.0]], "weights": [[0.5, 0.5]], "grid": [0.0, 0.5, 1.0],
        "values": [1.0, 0.1, 1.0], "lower": [0.0] * 3, "upper": [2.0] * 3, "sigma": 0.1,
        "matvecs": 2,
    },
    "landscape": {"alphas": [-1, 0, 1], "betas": [-1, 1], "losses": [[1, 2], [0, None], [1, 2]]},
    "blocks": {"names": ["a", "b"], **{name: [1.0, 2.0] for name in BLOCKS}},
}  # fmt: skip


def result(path, part=None, field=None, value=None):
    """A result.json with one field changed."""
    content = json.loads(json.dumps(GOOD))
    if part is not None:
        content[part][field] = value
    path.write_text(json.dumps(content))
    return path


def test_the_undamaged_result_is_drawn(tmp_path):
    assert list(figures.figures(report.read(result(tmp_path / "r")))) == list(figures.FIGURES)


@pytest.mark.parametrize(
    ("part", "field", "value", "words"),
    [
        ("density", "sigma", 0, "sigma must be > 0, got [0.0]"),
        ("density", "sigma", True, "sigma must be a number > 0, got True"),
        ("density", "weights", [[-0.5, 1.5]], "weights must be >= 0"),
        ("density", "weights", [[0.5, 0.5], [0.5]], "weights must be float64 numbers in lists"),
        ("density", "weights", [["0.5", "0.5"]], "weights must be float64 numbers in lists"),
        ("density", "weights", [[True, False]], "weights must be float64 numbers in lists"),
        ("density", "grid", [1.0, 0.5, 0.0], "grid must be ascending"),
        ("density", "nodes", [], "nodes must be float64 of shape (probes, steps)"),
        ("density", "upper", [1.0], "upper must be float64 of shape (g=3,), got"),
        ("density", "nodes", [[]], "weights must be float64 of shape (probes=1, steps=0)"),
        ("trace", "samples", {"0": 1.0}, "samples must be float64 numbers in lists"),
        ("trace", "samples", [], "it is empty: s = 0"),
        ("trace", "confidence", 95, "confidence must be between 0 and 1, got [95.0]"),
        ("trace", "converged", "yes", "converged must be true or false"),
        ("top", "residuals", [0.1], "residuals must be float64 of shape (k=2,), got"),
        ("top", "matvecs", [], "matvecs must be an integer"),
        ("blocks", "names", ["a", None], "names must be a list of text (b=2)"),
        ("blocks", "names", ["a", "b", "c"], "sizes must be float64 of shape (b=3,)"),
        ("landscape", "losses", [1, 2, 3], "losses must be float64 of shape (p=3, q=2), got"),
        ("landscape", "alphas", [1, 0, -1], "alphas must be ascending"),
    ],
)
def test_a_wrong_field_is_named_when_the_result_is_read(tmp_path, part, field, value, words):
    path = result(tmp_path / "result.json", part, field, value)
    message = refused_file(report.read, path, words)
    assert f"the part {part!r} of the result is damaged" in message


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("density", "sigma", None),
        ("density", "values", [None] * 3),
        ("density", "values", [0.0] * 3),
        ("trace", "interval", [None, None]),
        ("trace", "samples", [1e300, -1e300]),
        ("top", "residuals", [None, 0.1]),
        ("blocks", "values", [None, None]),
        ("landscape", "losses", [[None, None]] * 3),
    ],
)
def test_results_with_numbers_that_are_not_finite_are_drawn(tmp_path, part, field, value):
    drawn = figures.figures(report.read(result(tmp_path / "r", part, field, value)))
    assert list(drawn) == list(figures.FIGURES)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "is not JSON (Expecting value"),
        (b'{"format": ', "is not JSON (Expecting value"),
        (b'{"loss": NaN}', "NaN is no number of JSON"),
        (b'{"loss": -Infinity}', "-Infinity is no number of JSON"),
        (b'{"loss": 1e400}', "1e400 is above the largest float64"),
        (b'{"loss": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b'{"loss": 1, "loss": 2}', "the key 'loss' appears twice"),
        (b"[" * 100_000, "it is nested too deeply"),
        ('{"name": "é"}'.encode("latin-1"), "is not JSON ('utf-8' codec"),
        ('{"name": "é"}'.encode("utf-16"), "is not JSON ('utf-8' codec"),
        (b"\xef\xbb\xbf{}", "is not JSON"),
        (b"PK\x03\x04", "is not JSON"),
        (b'{"format": "fasthessian result 2"}', "a newer version wrote 'fasthessian result 2'"),
        (b'{"format": 1}', "expected format 'fasthessian result 1', found 1"),
    ],
)
def test_texts_that_are_not_results(tmp_path, text, words):
    path = tmp_path / "result.json"
    path.write_bytes(text)
    refused_file(report.read, path, words)


def test_a_folder_is_not_a_result_but_may_hold_one(tmp_path):
    result(tmp_path / "result.json")
    message = refused_file(report.read, tmp_path, " is a folder; give ")
    assert report.read(message.partition("; give ")[2]).to_json()["format"] == report.FORMAT


def test_a_figure_that_cannot_be_drawn_is_named(monkeypatch):
    def fail(*args):
        raise ArithmeticError("a bug\nof two lines")

    monkeypatch.setattr("fasthessian.results.plots.plot_estimate", fail)
    with pytest.raises(ValueError, match=r"trace.png cannot be drawn \(ArithmeticError: a bug of"):
        figures.figures(report.Result.from_json(GOOD))
