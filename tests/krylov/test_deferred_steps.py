"""Lanczos steps as a GPU makes them: enqueued, counted on the device, checked by later polls."""

import functools
import importlib
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fasthessian as fh
from fasthessian.krylov.lanczos import Lanczos
from tests.support.cuda_checks import NothingReadBack
from tests.support.krylov_runs import BACKENDS, SCHEDULES, defects, grown, rows_of
from tests.support.spectra import F64, diagonal, outliers


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_deferred_steps_are_the_same_steps(schedule):
    """Deferred checks change nothing: the same bits as with a check of every step."""
    spectrum = outliers(2000)
    late = Lanczos(diagonal(spectrum), 30, seed=0, schedule=schedule, deferred=True)
    assert not late.poll(wait=False)
    for _ in range(12):
        late.step()
    late.poll(wait=False)
    for _ in range(4):
        late.step()
    assert late.poll(wait=False)  # as of the last poll; with dcgs2 without its last row
    known = 12 if schedule == "cgs2" else 11
    direct = grown(diagonal(spectrum), known, schedule=schedule)
    assert torch.equal(late.state.T[:known, :known], direct.state.T[:known, :known])
    torch.testing.assert_close(
        late.state.T[known, :known], direct.state.T[known, :known], rtol=1e-12, atol=0
    )
    assert late.state.beta == pytest.approx(direct.state.beta, rel=1e-12)
    assert all(map(torch.allclose, late.ritz()[::2], direct.ritz()[::2]))
    while late.size < 30:
        late.step()
    assert late.poll(wait=True) and len(late.state.T) == 31
    direct = grown(diagonal(spectrum), 30, schedule=schedule)
    assert torch.equal(late.state.T, direct.state.T) and late.state.beta == direct.state.beta
    assert torch.equal(rows_of(late, 30), rows_of(direct, 30))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("refill", [False, True])
def test_rows_after_a_breakdown_are_discarded(schedule, refill):
    values = torch.tensor([2.0] * 30 + [5.0] * 10, dtype=F64)
    krylov = Lanczos(diagonal(values), 12, seed=0, schedule=schedule, refill=refill, deferred=True)
    while krylov.size < 12 and not krylov.state.exhausted:
        krylov.step()
        if krylov.size == 12 or krylov.size % 4 == 0:
            krylov.poll(wait=krylov.size == 12)
    assert krylov.state.broke_down
    if refill:
        assert krylov.size == 12 and max(defects(krylov, values)) < 1e-13
    else:
        assert krylov.size == 2 and krylov.state.exhausted
    ritz = krylov.ritz()[0]
    assert bool((((ritz - 2).abs() < 1e-12) | ((ritz - 5).abs() < 1e-12)).all())


def test_rows_after_a_candidate_within_the_basis_are_discarded():
    krylov = Lanczos(diagonal(outliers(2000)), 12, seed=0, deferred=True)
    for _ in range(8):
        krylov.step()
    krylov.state.coefficients.gauges[5, 1] = 0.9e-4 * krylov.state.coefficients.gauges[5, 0]
    krylov.poll(wait=True)
    assert krylov.state.broke_down and krylov.size == 5 and not krylov.state.T[5].any()
    assert not krylov.deferred and krylov.poll(wait=False)  # from here on every step is checked


@pytest.mark.parametrize("kept", [None, 5])
def test_a_poll_without_waiting_launches_no_kernel(kept):
    """A poll only copies the coefficients, also after a restart."""
    krylov, calls = Lanczos(diagonal(outliers(2000)), 30, seed=0, deferred=True), []
    if kept is not None:
        while krylov.size < 30:
            krylov.step()
        krylov.poll(wait=True)
        krylov.restart(torch.arange(kept))
        assert not krylov.poll(wait=False) and not krylov.poll(wait=False)
    krylov.step()

    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(func.overloadpacket._qualified_op_name.removeprefix("aten::"))
            return func(*args, **(kwargs or {}))

    module = SimpleNamespace(
        **{name: (lambda *a, n=name, **k: calls.append(n)) for name in ("project_", "update_")}
    )
    krylov.kernels, krylov.state.basis.kernels = module, module
    with Recorded():
        krylov.poll(wait=False)
    assert set(calls) <= {"slice", "clone"} and "clone" in calls


def test_nan_in_a_deferred_product_is_reported():
    def matvec(v):
        return v * float("nan") if calls.append(0) or len(calls) > 5 else v * values

    values, calls = torch.arange(1.0, 41.0), []
    A = fh.SymmetricOperator(matvec, 40, check=False)
    krylov = Lanczos(A, 20, seed=0, deferred=True)
    with pytest.raises(ValueError, match="NaN or Inf for a finite vector"):
        for _ in range(10):
            krylov.step()
        krylov.poll(wait=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("basis", ["full", "compressed"])
def test_a_step_that_counts_its_row_is_the_same_step(backend, basis):
    """What a CUDA graph would replay: the same call each time; a cell counts the rows."""
    spectrum = outliers(2000)
    krylov = Lanczos(diagonal(spectrum), 20, seed=0, backend=backend, basis=basis)
    counter = krylov.state.coefficients.counter
    for _ in range(20):
        krylov.delayed_step(counter[:1], counter, counter[1:])
    direct = grown(diagonal(spectrum), 20, backend=backend, basis=basis)
    assert counter.tolist() == [20, 19]
    assert torch.equal(krylov.state.coefficients.T[:20, :20], direct.state.T[:20, :20])
    assert torch.equal(krylov.state.basis.stored, direct.state.basis.stored)
    for run in (krylov, direct):
        run.state.size = 20
        run._accept(run.state.copy(delayed=True))
        run.restart(torch.tensor([19, 18, 0]))
    for _ in range(5):
        krylov.delayed_step(counter[:1], counter, counter[1:])
        direct.step()
    assert counter.tolist() == [8, 7]
    assert torch.equal(krylov.state.coefficients.T[:8, :8], direct.state.T[:8, :8])


def test_graph_says_why_steps_are_not_captured():
    assert grown(diagonal(torch.arange(1.0, 50.0)), 5).graph == "eager: cpu has no CUDA graphs"
    krylov = grown(diagonal(torch.arange(1.0, 50.0)), 5, graph=False)
    assert krylov.graph == "eager: graph=False"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_run_that_falls_back_to_checking_every_step_says_so(schedule, monkeypatch):
    values = torch.tensor([2.0] * 30 + [5.0] * 10, dtype=F64)
    eager, said = "eager: cpu has no CUDA graphs", ", every step checked since a breakdown at row 2"
    options = {"seed": 0, "schedule": schedule}
    late, direct = (Lanczos(diagonal(values), 12, deferred=d, **options) for d in (True, False))
    for run in (late, direct):
        assert run.graph == eager
        while run.size < 12:
            run.step()
        run.poll(wait=True)
    assert late.graph == eager + said and not late.deferred
    assert direct.graph == eager  # it checked every step from the start
    for name in ("eigsh", "density"):
        module = importlib.import_module(f"fasthessian.algorithms.{name}")
        monkeypatch.setattr(module, "Lanczos", functools.partial(Lanczos, deferred=True))
    A = diagonal(values)
    assert fh.eigsh(A, 2, "LA", schedule=schedule).graph.startswith(eager + said[:-1])
    assert fh.density(A, steps=12, schedule=schedule).graph == eager + said


def test_results_say_why_steps_were_not_captured():
    A = diagonal(outliers(200))
    cpu, off = "eager: cpu has no CUDA graphs", "eager: graph=False"
    assert fh.eigsh(A).graph == fh.density(A, steps=9, probes=2).graph == cpu
    assert fh.eigsh(A, graph=False).graph == fh.density(A, steps=9, graph=False).graph == off
    assert "without a basis" in fh.density(A, steps=9, basis="none").graph
    found = fh.spectrum(A, 1, steps=9, graph=False)
    assert {found.top.graph, found.bottom.graph, found.density.graph} == {off}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("basis", ["full", "compressed"])
def test_a_deferred_step_reads_nothing_back(schedule, basis):
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    data = torch.randn(9, 4), torch.randint(3, (9,))
    A = fh.Hessian(model, torch.nn.CrossEntropyLoss(), data)
    options = {"seed": 0, "schedule": schedule, "basis": basis}
    krylov = Lanczos(A, 10, deferred=True, **options)
    krylov.step()
    with NothingReadBack():
        for _ in range(5):
            krylov.step()
        krylov.poll(wait=False)  # the first poll only begins a copy
    krylov = Lanczos(A, 10, deferred=False, **options)
    with NothingReadBack(), pytest.raises(AssertionError, match="waits for the device"):
        krylov.step()
