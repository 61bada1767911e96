"""eigsh and density on a float16 basis, without one, and with steps that are looked at late."""

import functools
import importlib
import warnings

import pytest
import torch

import fasthessian as fh
from fasthessian.errors import ConvergenceWarning
from fasthessian.krylov.lanczos import Lanczos
from fasthessian.krylov.three_term import ThreeTerm
from tests.support.models import PROBLEMS
from tests.support.spectra import diagonal, outliers

F32, F64 = torch.float32, torch.float64


def explicit(A, pairs):
    """||A v - theta v|| in float64 for operators that are diagonal matrices."""
    X = pairs.vectors.double()
    return torch.stack(
        [(A @ x.to(A.dtype)).double() - t * x for x, t in zip(X, pairs.values, strict=True)]
    ).norm(dim=1)


@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_compressed_eigenpairs_report_explicit_residuals(which, dtype):
    spectrum = outliers(4000)
    A = diagonal(spectrum, dtype)
    k = {"SA": 1, "BE": 2}.get(which, 6)  # eigenvalues within the bulk are out of reach
    found = fh.eigsh(A, k, which, tol=2e-3, basis="compressed")
    assert found.converged and A.matvecs == found.matvecs
    torch.testing.assert_close(found.residuals, explicit(A, found), rtol=1e-3, atol=1e-6)
    want = fh.eigsh(diagonal(spectrum), len(found.values), which, tol=1e-10).values
    # an eigenvalue lies within each residual; Rayleigh-Ritz makes the error its square
    assert bool(((found.values - want).abs() <= found.residuals).all())
    assert ((found.values - want).abs() / want.abs()).max() < 1e-5
    gram = found.vectors.double() @ found.vectors.double().T
    assert (gram - torch.eye(len(gram))).abs().max() < 1e-6
    assert bool((found.residuals <= 2e-3 * found.values.abs() + 1e-4).all())


@pytest.mark.parametrize("schedule", ["dcgs2", "cgs2"])
@pytest.mark.parametrize("n", [40, 600])
@pytest.mark.parametrize("ratio", [1e3, 1e5])
def test_outliers_far_above_what_float16_resolves(schedule, n, ratio):
    """The bulk then is noise to the basis: no false alarm, no invented node, the outliers right."""
    d = torch.linspace(0.01, 1, n, dtype=F64)
    d[:3] = ratio * torch.arange(1, 4)
    found = fh.eigsh(diagonal(d), 3, tol=1e-2, basis="compressed", schedule=schedule)
    want = torch.tensor([3.0, 2.0, 1.0], dtype=F64) * ratio
    torch.testing.assert_close(found.values, want, rtol=1e-5, atol=0)
    nodes = fh.density(diagonal(d), steps=60, basis="compressed", schedule=schedule).nodes
    assert nodes.min() > -2e-3 * 3 * ratio and abs(nodes.max() / want[0] - 1) < 1e-3


@pytest.mark.parametrize("schedule", ["dcgs2", "cgs2"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_density_finer_than_float16_resolves_says_so(schedule, dtype):
    """A bulk of width 1 below 3000: float16 rows end the run, the others resolve it."""
    d = torch.linspace(-0.3, 0.7, 4000, dtype=F64)
    d[:3] = torch.tensor([3000.0, 2100.0, 1500.0])
    options = {"steps": 40, "schedule": schedule}
    with pytest.warns(ConvergenceWarning, match="float16 basis ended after .* of 40 steps") as told:
        found = fh.density(diagonal(d, dtype), sigma=0.1, basis="compressed", **options)
    assert len(told) == 1 and int((found.weights > 0).sum()) < 10
    # at the width that is asked for by default, ten times that, nothing is lost
    fh.density(diagonal(d, dtype), basis="compressed", **options)
    for basis in ("full", "none"):
        found = fh.density(diagonal(d, dtype), sigma=0.1, basis=basis, **options)
        assert int((found.weights > 0).sum()) > 30, basis


def test_a_density_that_ends_exactly_is_silent():
    A = fh.SymmetricOperator(lambda v: 2 * v, 1024)  # signs / 32: no number is rounded
    assert fh.density(A, steps=20, sigma=1e-6, basis="compressed").matvecs == 1


@pytest.mark.parametrize("schedule", ["dcgs2", "cgs2"])
def test_steps_looked_at_late_tell_of_the_same_loss(schedule):
    d = torch.linspace(-0.3, 0.7, 4000, dtype=F64)
    d[:3] = torch.tensor([3000.0, 2100.0, 1500.0])
    lost = []
    for deferred in (False, True):
        options = {"refill": False, "deferred": deferred, "schedule": schedule}
        krylov = Lanczos(diagonal(d, F32), 20, seed=0, basis="compressed", **options)
        for _ in range(3 if deferred else 0):
            krylov.step()
        assert krylov.resolution == 0
        while krylov.size < 20 and not krylov.state.exhausted:
            krylov.step()
        krylov.poll(True)
        lost.append((krylov.size, krylov.resolution))
    assert lost[0] == lost[1] and 2 < lost[0][1] < 10


@pytest.mark.parametrize("schedule", ["dcgs2", "cgs2"])
def test_invariant_subspaces_end_on_a_compressed_basis(schedule):
    found = fh.eigsh(diagonal(torch.full((1000,), 2.0)), 1, basis="compressed", schedule=schedule)
    assert found.converged and abs(found.values[0] - 2) < 1e-12
    M = torch.ones(40, 40, dtype=F64)
    A = fh.SymmetricOperator(lambda v: M @ v, 40, dtype=F64)
    found = fh.eigsh(A, 40, "SA", basis="compressed", schedule=schedule)
    want = torch.tensor([0.0] * 39 + [40.0], dtype=F64)
    torch.testing.assert_close(found.values, want, rtol=0, atol=1e-10)
    gram = found.vectors @ found.vectors.T
    torch.testing.assert_close(gram, torch.eye(40, dtype=F64), rtol=0, atol=1e-10)


def test_compressed_runs_keep_to_their_products():
    with pytest.warns(ConvergenceWarning):
        found = fh.eigsh(diagonal(outliers(2000)), 5, basis="compressed", max_matvecs=15)
    assert found.matvecs <= 15


def test_compressed_runs_need_two_products_a_pair():
    with pytest.raises(ValueError, match="max_matvecs must be at least 10, got 9"):
        fh.eigsh(diagonal(outliers(2000)), 5, basis="compressed", max_matvecs=9)


def test_compressed_pairs_out_of_reach_say_so():
    A = diagonal(outliers(4000))
    with pytest.warns(
        ConvergenceWarning,
        match="raise max_matvecs or tol; residuals under 2e-4 .* need basis='full'",
    ):
        found = fh.eigsh(A, 6, tol=1e-7, basis="compressed", max_matvecs=120)
    assert not found.converged and bool((found.residuals < 0.1).all())


def test_compressed_eigenpairs_of_more_than_a_block_stay_in_order():
    values = torch.cat([torch.linspace(10, 30, 20), torch.rand(500)]).double()
    found = fh.eigsh(diagonal(values), 20, "LA", tol=1e-2, basis="compressed")
    want = torch.linspace(30, 10, 20, dtype=F64)
    torch.testing.assert_close(found.values, want, rtol=1e-4, atol=0)


@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer"])
def test_compressed_results_agree_with_the_dense_matrix(name):
    problem = PROBLEMS[name]
    dense = torch.linalg.eigvalsh(problem.dense(*problem.make(F64)))
    made = problem.make(F32)
    found = fh.eigsh(problem.operator(*made), 3, "LA", tol=5e-3, basis="compressed")
    want = dense.flip(0)[:3]
    assert bool(((found.values - want).abs() <= found.residuals + 1e-4 * want[0]).all())
    A = problem.operator(*made)
    full = fh.density(A, steps=40, sigma=0.01 * float(want[0]))
    half = fh.density(A, steps=40, sigma=0.01 * float(want[0]), basis="compressed")
    # the nodes at the ends, and the mass below points between, agree to float16's rounding
    assert abs(half.nodes.max() / full.nodes.max() - 1) < 2e-3
    for at in (0.02 * want[0], 0.5 * want[0]):
        mass = [float(d.weights[d.nodes <= at].sum()) for d in (full, half)]
        assert abs(mass[0] - mass[1]) < 5e-3
    torch.testing.assert_close(half.weights.sum(), torch.tensor(1.0, dtype=F64))


def test_compressed_basis_takes_half_the_memory():
    A = diagonal(torch.arange(1.0, 10001.0), F32)
    sizes = [
        Lanczos(A, 50, seed=0, basis=basis).state.basis.stored.untyped_storage().nbytes()
        for basis in ("full", "compressed")
    ]
    assert sizes[1] <= 0.51 * sizes[0]


def test_same_seed_same_bits_on_a_compressed_basis():
    A = diagonal(outliers(3000), F32)
    first, second = (fh.density(A, steps=40, basis="compressed") for _ in range(2))
    assert torch.equal(first.nodes, second.nodes) and torch.equal(first.weights, second.weights)


def moments(d, powers):
    return [float((d.weights * d.nodes**p).sum()) for p in powers]


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("deferred", [False, True])
def test_density_without_a_basis_is_the_same_quadrature(dtype, deferred, monkeypatch):
    module = importlib.import_module("fasthessian.algorithms.density")
    monkeypatch.setattr(module, "ThreeTerm", functools.partial(ThreeTerm, deferred=deferred))
    spectrum = outliers(5000)
    A = diagonal(spectrum, dtype)
    full = fh.density(A, steps=60, sigma=0.5)
    bare = fh.density(A, steps=60, sigma=0.5, basis="none")
    assert bare.matvecs == 60
    tolerance = 1e-4 if dtype is F32 else 1e-10
    for a, b in zip(moments(full, range(5)), moments(bare, range(5)), strict=True):
        assert abs(a - b) < tolerance * max(abs(a), 1)
    at = torch.linspace(-2, 2, 9, dtype=F64)
    for x in at:
        a, b = (float(d.values[(d.grid - x).abs().argmin()]) for d in (full, bare))
        assert abs(a - b) < 2e-2 * max(full.values)
    if dtype is F32:  # and it did lose orthogonality: copies of the largest eigenvalue
        assert int(((bare.nodes - 100).abs() < 1e-3).sum()) > 1
        assert int(((full.nodes - 100).abs() < 1e-3).sum()) == 1


@pytest.mark.parametrize("deferred", [False, True])
def test_density_without_a_basis_ends_at_an_invariant_subspace(deferred, monkeypatch):
    module = importlib.import_module("fasthessian.algorithms.density")
    monkeypatch.setattr(module, "ThreeTerm", functools.partial(ThreeTerm, deferred=deferred))
    values = torch.tensor([2.0] * 30 + [5.0] * 10, dtype=F64)
    d = fh.density(diagonal(values), steps=12, basis="none")
    nodes = d.nodes[d.weights > 0]
    torch.testing.assert_close(nodes, torch.tensor([2.0, 5.0], dtype=F64))
    torch.testing.assert_close(d.weights.sum(), torch.tensor(1.0, dtype=F64))
    assert d.matvecs == (12 if deferred else 2)


def test_density_without_a_basis_keeps_three_vectors():
    run = ThreeTerm(diagonal(torch.arange(1.0, 10001.0), F32), 50, seed=0)
    assert run.state.rows.untyped_storage().nbytes() < 3.1 * 4 * 10_000
    for _ in range(50):
        run.step()
    assert len(run.jacobi()) == 50


@pytest.fixture
def late(monkeypatch):
    """Every run of eigsh, density and spectrum is deferred, as on a GPU."""
    for name in ("eigsh", "density", "spectrum"):
        module = importlib.import_module(f"fasthessian.algorithms.{name}")
        monkeypatch.setattr(module, "Lanczos", functools.partial(Lanczos, deferred=True))


@pytest.mark.parametrize("which", ["LM", "LA", "SA", "BE"])
@pytest.mark.parametrize("basis", ["full", "compressed"])
def test_late_looks_find_the_same_eigenvalues(late, which, basis):
    spectrum = outliers(3000)
    A = diagonal(spectrum, F32)
    k = 1 if which == "SA" else 5
    found = fh.eigsh(A, k, which, tol=2e-3, basis=basis)
    assert found.converged and found.matvecs == A.matvecs
    order = {
        "LM": spectrum.abs().argsort(descending=True),
        "LA": spectrum.argsort(descending=True),
        "SA": spectrum.argsort(),
    }
    if which == "BE":
        ends = spectrum.sort().values
        want = torch.cat([ends[-3:], ends[:2]]).sort(descending=True).values
    else:
        want = spectrum[order[which]][:k]
    assert bool(((found.values - want).abs() <= found.residuals).all())


def test_late_looks_survive_breakdowns_and_restarts(late):
    multiple = torch.tensor([9.0] * 3 + [5.0] * 2 + [1.0] * 60, dtype=F64)
    found = fh.eigsh(diagonal(multiple), 6, "LA", tol=1e-8)
    torch.testing.assert_close(
        found.values, torch.tensor([9.0, 9, 9, 5, 5, 1], dtype=F64), rtol=1e-8, atol=0
    )
    d = fh.density(diagonal(multiple), steps=30)
    nodes = d.nodes[d.weights > 1e-12]
    torch.testing.assert_close(nodes, torch.tensor([1.0, 5, 9], dtype=F64))
    found = fh.eigsh(diagonal(outliers(3000)), 4, "LA", ncv=12, tol=1e-6)
    assert found.converged and found.matvecs > 12
    torch.testing.assert_close(
        found.values, torch.tensor([100.0, 60, 40, 30], dtype=F64), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("basis", ["full", "compressed"])
def test_late_looks_give_the_same_density_and_spectrum(request, basis):
    def answers():
        A = diagonal(outliers(2000), F32)
        density = fh.density(A, steps=37, basis=basis)  # the last look is due behind one of all
        return density, fh.spectrum(A, (3, 1), steps=37, basis=basis)

    (density, spectrum), _ = answers(), request.getfixturevalue("late")
    late_density, late_spectrum = answers()
    for found, want in ((late_density, density), (late_spectrum.density, spectrum.density)):
        assert torch.equal(found.nodes, want.nodes) and torch.equal(found.values, want.values)
    for end in ("top", "bottom"):
        found, want = getattr(late_spectrum, end), getattr(spectrum, end)
        torch.testing.assert_close(found.values, want.values, rtol=1e-5, atol=1e-5)
    assert late_spectrum.trace.value == pytest.approx(spectrum.trace.value, rel=1e-4)


@pytest.mark.parametrize("basis", ["full", "compressed"])
@pytest.mark.parametrize("limit", range(8, 13))
def test_late_looks_count_no_pair_twice(late, limit, basis):
    """Three eigenvalues, ten times each: fewer rows than pairs are left when products are spent."""
    A = diagonal([3.0] * 10 + [1.0] * 10 + [-2.0] * 10, F32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = fh.eigsh(A, 4, "BE", max_matvecs=limit, basis=basis)
        both = fh.spectrum(A, 2, steps=2, rtol=0.5, max_matvecs=limit + 16, basis=basis)
    ends = torch.cat([both.top.vectors, both.bottom.vectors])
    for V in (found.vectors.double(), ends.double()):
        assert (V @ V.T - torch.eye(4, dtype=F64)).abs().max() < 1e-5


def test_late_looks_take_few_products_more_where_every_step_ends_the_space(late):
    A = diagonal(torch.ones(47), F64)
    assert fh.eigsh(A, 47, max_matvecs=47).converged and A.matvecs <= 2 * 47


def test_late_looks_end_at_full_rank_and_at_the_limit(late):
    values = torch.linspace(-3, 7, 24, dtype=F64)
    found = fh.eigsh(diagonal(values), 24, "LA", tol=1e-10)
    torch.testing.assert_close(found.values, values.flip(0), rtol=0, atol=1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        found = fh.eigsh(diagonal(outliers(3000)), 4, "LA", tol=1e-12, max_matvecs=12)
    assert found.matvecs == 12 and not found.converged
