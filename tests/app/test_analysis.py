import types

import pytest
import torch
from torch import nn

from fasthessian.app import analysis
from fasthessian.app.analysis import Spectra, Timed, analyze, default_span, operator, spectra
from fasthessian.app.options import AnalysisOptions
from fasthessian.app.problems import Problem
from fasthessian.errors import ConvergenceWarning


def quiet(title, at_most=None):
    """A stage that shows nothing."""
    return lambda done, total: None


def problem():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    data = torch.randn(20, 4), torch.randint(2, (20,))
    return Problem("small", model, nn.CrossEntropyLoss(), data, {"about": "small"})


@pytest.mark.parametrize("scale", [1e-8, 1e8])
def test_the_default_span_follows_the_scale_of_parameters_not_of_the_loss(scale):
    assert default_span(0.2 * scale, 4.0 * scale) == default_span(0.2, 4.0) == 1.0
    assert default_span(0.2, 0.04) == 10.0  # ten times wider parameters
    assert default_span(-1.0, 2.0) == default_span(1.0, -2.0) == 1.0


@pytest.mark.parametrize(
    ("parts", "stages"),
    [
        ({}, ["spectrum"]),
        ({"density": False}, ["spectrum"]),
        ({"bottom": 0}, ["spectrum"]),
        ({"trace": False}, ["top", "bottom", "density"]),
        ({"trace": False, "density": False, "bottom": 0}, ["top"]),
        ({"top": 0, "bottom": 0, "density": False}, ["trace"]),
        ({"top": 0, "bottom": 0, "trace": False}, ["density"]),
    ],
)
def test_eigenvalues_and_trace_come_from_one_run_and_other_parts_from_their_own(parts, stages):
    asked = {"top": 2, "bottom": 1, "steps": 6, "trace_rtol": 0.5, "landscape": False} | parts
    options, timed = AnalysisOptions(**asked), Timed(quiet)
    A = operator(problem(), options)
    found = spectra(A, options, timed)
    assert list(timed.seconds) == stages
    for name, part in found._asdict().items():
        assert (part is not None) == bool(getattr(options, name)), name
    exact = torch.linalg.eigvalsh((A @ torch.eye(A.n)).double())
    if found.top is not None:
        assert found.top.values.tolist() == pytest.approx(exact.flip(0)[:2].tolist(), rel=1e-3)
    if found.trace is not None:
        low, high = found.trace.interval
        assert low <= exact.sum() <= high
    if found.density is not None:
        assert found.density.nodes.shape == (1, 6)


def test_one_run_takes_fewer_products_than_the_parts_apart():
    options = AnalysisOptions(top=2, bottom=2, steps=20, landscape=False)
    A = operator(problem(), options)
    before = A.matvecs
    spectra(A, options, Timed(quiet))
    together, before = A.matvecs - before, A.matvecs
    spectra(
        A, AnalysisOptions(top=2, bottom=2, trace=False, steps=20, landscape=False), Timed(quiet)
    )
    assert together < A.matvecs - before


def test_products_for_the_eigenvalues_stay_within_the_option():
    options = AnalysisOptions(
        top=2, bottom=2, max_products=7, steps=4, trace_rtol=0.9, landscape=False
    )
    with pytest.warns(ConvergenceWarning, match="of 4 eigenpairs converged"):
        found = spectra(operator(problem(), options), options, Timed(quiet))
    assert found.top.matvecs <= 7 and found.trace.matvecs <= 16


@pytest.mark.parametrize("stage", ["landscape", "block_spectra"])
def test_a_late_stage_that_fails_costs_no_numbers(monkeypatch, stage):
    def fail(*args, **options):
        raise MemoryError("no room for\nengine='recompute'")

    monkeypatch.setattr(analysis, stage, fail)
    options = AnalysisOptions(top=1, bottom=0, trace=False, density=False, points=3, blocks="layer")
    found = analyze(problem(), options, quiet)
    assert found.top is not None
    title = "loss landscape" if stage == "landscape" else "2 blocks"
    assert found.failed == (f"{title} failed: MemoryError: no room for --engine recompute",)
    assert found.failed[0] in found.notes
    assert (found.landscape is None, found.blocks is None) == (
        stage == "landscape",
        stage == "block_spectra",
    )


def test_the_kernels_on_record_are_those_of_the_operators_device(monkeypatch):
    def select(device):
        return types.SimpleNamespace(NAME=f"kernels for {device}")

    def moved(A, options, timed):
        A.device = torch.device("cuda", 1)
        return Spectra()

    monkeypatch.setattr(analysis, "spectra", moved)
    monkeypatch.setattr(analysis, "kernels", types.SimpleNamespace(select=select))
    options = AnalysisOptions(top=1, bottom=0, trace=False, density=False, landscape=False)
    assert analyze(problem(), options, quiet).kernels == "kernels for cuda:1"
