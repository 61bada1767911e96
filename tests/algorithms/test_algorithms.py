"""eigsh, trace, density and landscape against dense float64 Hessians and closed forms."""

import math
import warnings

import numpy as np
import pytest
import torch

import fasthessian as fh
from fasthessian.krylov.intervals import student_t
from fasthessian.krylov.ritz import wanted
from tests.support.models import PROBLEMS
from tests.support.spectra import F32, F64, diagonal, outliers


@pytest.fixture(params=sorted(PROBLEMS))
def problem(request):
    """(operator in float32, dense float64 Hessian) of every model of the table."""
    made = PROBLEMS[request.param]
    dense = made.dense(*made.make(F64))
    return made.operator(*made.make(F32)), dense


@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
def test_eigsh_is_within_its_residuals(problem, which):
    A, dense = problem
    exact = torch.linalg.eigvalsh(dense)
    k = min(4, A.n)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fh.ConvergenceWarning)  # clusters at 0: residuals suffice
        found = fh.eigsh(A, k, which, max_matvecs=3 * A.n + k)
    want = {
        "LM": exact[exact.abs().argsort(descending=True)][:k],
        "LA": exact.flip(0)[:k],
        "SA": exact[:k],
        "BE": torch.cat((exact[: k // 2], exact[A.n - (k - k // 2) :])).flip(0),
    }[which]
    if which == "LM":  # equal magnitudes may swap
        torch.testing.assert_close(found.values.abs(), want.abs(), rtol=1e-4, atol=1e-6)
    else:
        assert bool(((found.values - want).abs() <= found.residuals).all())
    nearest = (found.values[:, None] - exact).abs().min(1).values
    assert bool((nearest <= found.residuals).all())
    R = found.vectors.double() @ dense - found.values[:, None] * found.vectors.double()
    assert bool((R.norm(dim=1) <= 1.5 * found.residuals).all())
    gram = found.vectors.double() @ found.vectors.double().T
    assert (gram - torch.eye(k)).abs().max() < 2e-6


def test_trace_interval_and_density_against_dense(problem):
    A, dense = problem
    estimate = fh.trace(A, confidence=0.999, rtol=0.5, max_matvecs=4000)
    assert estimate.converged
    low, high = estimate.interval
    assert low <= float(dense.trace()) <= high and low < estimate.value < high
    steps = min(A.n, 60)
    density = fh.density(A, steps=steps, probes=8)
    exact = torch.linalg.eigvalsh(dense)
    z = (density.grid[:, None] - exact) / density.sigma
    truth = torch.exp(-0.5 * z**2).mean(1) / (density.sigma * math.sqrt(2 * math.pi))
    scale = float(truth.max())
    inside = (truth >= density.lower - 1e-3 * scale) & (truth <= density.upper + 1e-3 * scale)
    assert inside.double().mean() > 0.9
    assert density.matvecs == 8 * steps or density.weights[:, -1].max() == 0


def test_logistic_regression_closed_form():
    made = PROBLEMS["logistic"]
    model, criterion, (x, y) = made.make(F64)
    p = torch.sigmoid(model(x).detach())
    closed = (x.T * (p * (1 - p)).T) @ x / len(x)  # X' diag(p (1 - p)) X / m
    A = made.operator(model, criterion, (x, y))
    found = fh.eigsh(A, A.n, "SA")
    torch.testing.assert_close(found.values, torch.linalg.eigvalsh(closed), rtol=0, atol=1e-14)


def test_eigsh_agrees_with_an_independent_library():
    spectrum = outliers(3000)
    A = diagonal(spectrum)
    ours = fh.eigsh(A, 6, "LM", tol=1e-8).values.numpy()
    linalg = pytest.importorskip("scipy.sparse.linalg")
    theirs = linalg.eigsh(A.to_scipy(), 6, which="LM", return_eigenvectors=False)
    np.testing.assert_allclose(sorted(ours), sorted(theirs), rtol=1e-10)


@pytest.mark.parametrize("scale", [1e-8, 1e-4, 1.0, 1e8])
def test_scale_equivariance(scale):
    spectrum = outliers(2000)
    one, other = diagonal(spectrum, F32), diagonal(spectrum, F32, scale)
    pairs = [fh.eigsh(A, 5, "LM") for A in (one, other)]
    assert pairs[0].matvecs == pairs[1].matvecs
    np.testing.assert_allclose(pairs[1].values / scale, pairs[0].values, rtol=1e-5)
    M = torch.randn(50, 50, generator=torch.Generator().manual_seed(0))
    traces = [
        fh.trace(fh.SymmetricOperator(lambda v, s=s: s * (M @ (M.T @ v)), 50)).value
        for s in (1.0, scale)
    ]
    assert abs(traces[1] / scale / traces[0] - 1) < 1e-5
    densities = [fh.density(A, steps=30) for A in (one, other)]
    np.testing.assert_allclose(densities[1].sigma / scale, densities[0].sigma, rtol=1e-5)
    peak = float(densities[0].values.max())
    assert (densities[1].values * scale - densities[0].values).abs().max() < 1e-3 * peak


def test_same_seed_same_bits_other_seed_other_numbers():
    spectrum = outliers(2000)
    M = torch.randn(80, 80, generator=torch.Generator().manual_seed(0))
    B = fh.SymmetricOperator(lambda v: M @ (M.T @ v), 80)
    for call, fields in (
        (lambda s: fh.eigsh(diagonal(spectrum, F32), 3, seed=s), ("values", "vectors")),
        (lambda s: fh.trace(B, seed=s), ("samples",)),
        (lambda s: fh.density(B, steps=20, seed=s), ("nodes", "weights")),
    ):
        first, again, other = call(7), call(7), call(8)
        for field in fields:
            assert torch.equal(getattr(first, field), getattr(again, field))
            assert not torch.equal(getattr(first, field), getattr(other, field))


def test_multiplicities_are_found():
    values = torch.tensor([5.0] * 3 + [1.0] * 40 + [0.0] * 57)
    found = fh.eigsh(diagonal(values, F32), 5, "LA")
    torch.testing.assert_close(found.values.float(), torch.tensor([5.0, 5, 5, 1, 1]))
    assert found.converged
    # eight copies take eight fresh starts: a check before the basis is full would miss some
    many = torch.tensor([5.0] * 8 + [1.0] * 40 + [0.0] * 52)
    assert fh.eigsh(diagonal(many, F32), 8, "LA").values.min() > 4.999
    zero = fh.eigsh(diagonal(torch.zeros(50)), 3)
    assert zero.converged and zero.values.tolist() == [0, 0, 0]


def test_the_order_in_which_pairs_are_wanted():
    values = torch.tensor([-9.0, -2.0, 0.0, 1.0, 3.0, 10.0], dtype=F64)
    for which, want in (
        ("LA", [10, 3, 1, 0, -2, -9]), ("SA", [-9, -2, 0, 1, 3, 10]), ("LM", [10, -9, 3, -2, 1, 0]),
        ((2, 2), [10, 3, -2, -9, 1, 0]), ((2, 1), [10, 3, -9, -2, 1, 0]), ((0, 2), [-2, -9, 10, 0]),
    ):  # fmt: skip
        assert values[wanted(values, which)][: len(want)].tolist() == want


def test_plus_and_minus_one_are_both_found():
    values = torch.cat([torch.tensor([1.0, -1.0]), torch.linspace(-0.5, 0.5, 500)])
    found = fh.eigsh(diagonal(values, F32), 2, "LM", tol=1e-5)
    assert sorted(round(v, 6) for v in found.values.tolist()) == [-1, 1]


def test_restarts_reach_the_same_pairs_with_little_memory():
    spectrum = outliers(3000)
    small = fh.eigsh(diagonal(spectrum), 8, "LA", ncv=12, tol=1e-6)
    assert small.converged
    np.testing.assert_allclose(small.values, sorted(spectrum.tolist())[::-1][:8], rtol=1e-8)


def test_not_converged_is_said():
    dense_bulk = diagonal(torch.linspace(0, 1, 5000))
    with pytest.warns(fh.ConvergenceWarning, match="raise max_matvecs"):
        found = fh.eigsh(dense_bulk, 3, "LA", tol=1e-10, max_matvecs=40)
    assert not found.converged and found.matvecs == 40
    truth = torch.linspace(0, 1, 5000, dtype=F64)
    nearest = (found.values[:, None] - truth).abs().min(1).values
    assert bool((nearest <= found.residuals).all())


def test_progress_reports_products():
    calls = []
    A = diagonal(outliers(2000), F32)
    found = fh.eigsh(A, 2, progress=lambda done, total: calls.append((done, total)))
    assert [done for done, _ in calls] == list(range(1, found.matvecs + 1))
    calls.clear()
    fh.density(A, steps=5, probes=2, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i, 10) for i in range(1, 11)]
    calls.clear()
    estimate = fh.trace(A, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (estimate.matvecs, estimate.matvecs)


def test_trace_interval_covers_as_often_as_it_says():
    """Over 300 seeds; the binomial spread of the count is 3 sigma on the low side."""
    M = torch.randn(60, 60, generator=torch.Generator().manual_seed(0), dtype=F64)
    A = fh.SymmetricOperator(lambda v: M @ (M.T @ v), 60, dtype=F64)
    truth, hits = float((M @ M.T).trace()), 0
    for seed in range(300):
        low, high = fh.trace(A, rtol=0.05, seed=seed).interval
        hits += low <= truth <= high
    assert hits / 300 >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 300)


def test_trace_stops_by_its_interval_and_not_before():
    M = torch.randn(60, 60, generator=torch.Generator().manual_seed(0), dtype=F64)
    A = fh.SymmetricOperator(lambda v: M @ (M.T @ v), 60, dtype=F64)
    tight, loose = (fh.trace(A, method="hutchinson", rtol=rtol) for rtol in (0.02, 0.2))
    assert tight.matvecs > loose.matvecs == 16
    for estimate, rtol in ((tight, 0.02), (loose, 0.2)):
        assert (estimate.interval[1] - estimate.interval[0]) / 2 <= rtol * abs(estimate.value)
        assert len(estimate.samples) == estimate.matvecs
        assert estimate.value == pytest.approx(float(estimate.samples.mean()))
    B = fh.SymmetricOperator(lambda v: v.flip(0), 40, dtype=F64)  # trace 0
    with pytest.warns(fh.ConvergenceWarning, match="wider than rtol"):
        assert not fh.trace(B, max_matvecs=50).converged


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.99])
def test_student_quantile_against_scipy(confidence):
    stats = pytest.importorskip("scipy.stats")
    for df in (1, 2, 3, 7, 15, 31, 100, 1000):
        want = stats.t.ppf((1 + confidence) / 2, df)
        close = 1e-4 if df >= 15 else 5e-3 if confidence <= 0.95 else 3e-2
        assert abs(student_t(confidence, df) / want - 1) < close, df


def test_density_integrates_to_one_on_a_grid_finer_than_its_kernel():
    for spread in (1.0, 1e3, 2e4):
        d = fh.density(diagonal(outliers(2000), F64, spread / 100), steps=30, probes=2)
        step = float(d.grid[1] - d.grid[0])
        assert step <= d.sigma / 3.9
        assert abs(float(d.values.sum()) * step - 1) < 1e-12
        assert torch.allclose(d.weights.sum(1), torch.ones(2, dtype=F64), atol=1e-12)
    d = fh.density(diagonal(outliers(2000)), steps=30, sigma=0.05)
    assert d.sigma == 0.05
    with pytest.warns(UserWarning, match="nodes and weights are unaffected"):
        d = fh.density(diagonal(outliers(2000)), steps=30, sigma=1e-9)
    step = float(d.grid[1] - d.grid[0])
    assert len(d.grid) <= 1 << 18 and abs(float(d.values.sum()) * step - 1) < 1e-12


def test_density_moments_are_gauss_quadrature():
    """m nodes integrate v'A^p v exactly up to p = 2m - 1 (v random signs: v'v = n)."""
    values = torch.linspace(-1, 2, 300, dtype=F64)
    d = fh.density(diagonal(values), steps=6)
    for p in range(12):
        exact = float((values**p).mean())  # signs against a diagonal: no sampling error
        assert abs(float((d.weights * d.nodes**p).sum()) - exact) < 1e-11


def test_density_invents_no_nodes_after_a_breakdown():
    values = torch.tensor([0.0] * 6 + [1.0] * 3 + [5.0], dtype=F64)
    d = fh.density(diagonal(values), steps=100)
    assert d.nodes.shape == d.weights.shape == (1, 100) and d.matvecs == 3
    real = d.weights[0] > 0
    torch.testing.assert_close(d.nodes[0][real], torch.tensor([0.0, 1, 5], dtype=F64))
    torch.testing.assert_close(d.weights[0][real], torch.tensor([0.6, 0.3, 0.1], dtype=F64))
    assert bool((d.nodes[0][~real] == d.nodes[0][2]).all())
    for constant in (0.0, 3.0):
        d = fh.density(diagonal(torch.full((10,), constant)), steps=5)
        assert d.weights[0, 0] == 1 and abs(float(d.nodes[0, 0]) - constant) < 1e-12


def test_landscape_of_a_quadratic_is_the_quadratic():
    H = torch.tensor([[3.0, 1.0], [1.0, 2.0]], dtype=F64)
    theta = torch.tensor([0.5, -1.0], dtype=F64, requires_grad=True)
    A = fh.Hessian.from_closure(lambda: 0.5 * theta @ H @ theta, [theta])
    before = theta.detach().clone()
    directions = torch.eye(2, dtype=F64)
    found = fh.landscape(A, directions, span=2.0, points=5)
    for i, a in enumerate(found.alphas):
        for j, b in enumerate(found.betas):
            point = before + torch.stack((a, b))
            assert abs(float(found.losses[i, j] - 0.5 * point @ H @ point)) < 1e-12
    assert torch.equal(theta, before) and found.losses[2, 2] == A.loss()
    line = fh.landscape(A, directions[0], points=3)
    assert line.losses.shape == (3,) and line.betas.numel() == 0
    same = fh.landscape(A, directions[:1], points=3)
    assert torch.equal(line.losses, same.losses)


BAD = [
    (lambda A: fh.eigsh(A, 0), ValueError, "k must be from 1 to 40, got 0"),
    (lambda A: fh.eigsh(A, 41), ValueError, "k must be from 1 to 40, got 41"),
    (lambda A: fh.eigsh(A, 1.5), TypeError, "k must be an integer"),
    (lambda A: fh.eigsh(A, True), TypeError, "k must be an integer"),
    (lambda A: fh.eigsh(A, 2, "SM"), ValueError, "which must be one of LM, LA, SA, BE"),
    (lambda A: fh.eigsh(A, 2, tol=0), ValueError, "tol must be a finite positive"),
    (lambda A: fh.eigsh(A, 2, tol=float("nan")), ValueError, "tol"),
    (lambda A: fh.eigsh(A, 2, ncv=3), ValueError, "ncv must be from 4 to 40"),
    (lambda A: fh.eigsh(A, 2, max_matvecs=1), ValueError, "max_matvecs must be at least 2"),
    (lambda A: fh.eigsh(A, 2, seed=-1), ValueError, "seed must be from 0"),
    (lambda A: fh.eigsh(torch.eye(3), 2), TypeError, "A must be an operator, got Tensor"),
    (lambda A: fh.trace(A, method="magic"), ValueError, "method must be one of auto, hutchinson"),
    (lambda A: fh.trace(A, rtol=0), ValueError, "rtol must be between 0 and 1"),
    (lambda A: fh.trace(A, confidence=1), ValueError, "confidence must be between 0 and 1"),
    (lambda A: fh.trace(A, max_matvecs=1), ValueError, "max_matvecs must be at least 2"),
    (lambda A: fh.density(A, steps=0), ValueError, "steps must be at least 1, got 0"),
    (lambda A: fh.density(A, probes=0), ValueError, "probes must be at least 1, got 0"),
    (lambda A: fh.density(A, sigma=-1), ValueError, "sigma must be a finite positive"),
    (lambda A: fh.density(A, sigma="wide"), TypeError, "sigma must be a number"),
    (lambda A: fh.landscape(A, torch.ones(40)), TypeError, "A must know its loss"),
]


@pytest.mark.parametrize(("call", "error", "message"), BAD)
def test_bad_arguments_are_refused_in_one_line(call, error, message):
    with pytest.raises(error, match=message) as caught:
        call(diagonal(torch.arange(1.0, 41.0)))
    assert "\n" not in str(caught.value)


def test_landscape_refuses_directions_that_do_not_fit():
    theta = torch.zeros(3, requires_grad=True)
    A = fh.Hessian.from_closure(lambda: (theta**2).sum(), [theta])
    for directions in (torch.ones(4), torch.ones(3, 3), torch.ones(1, 1, 3), torch.tensor(1.0)):
        with pytest.raises(ValueError, match="directions must have shape"):
            fh.landscape(A, directions)
    with pytest.raises(ValueError, match=r"directions must be torch\.float32"):
        fh.landscape(A, torch.ones(3, dtype=F64))
    with pytest.raises(ValueError, match="points must be at least 2"):
        fh.landscape(A, torch.ones(3), points=1)
