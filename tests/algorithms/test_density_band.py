"""The density's band holds the truth for common numbers of steps and shows what is unknown."""

import math

import pytest
import torch

import fasthessian as fh
from fasthessian.krylov.quadrature import christoffel, quadrature, unresolved, width
from tests.support.spectra import Dense, joined, normal, rotated

pytestmark = pytest.mark.slow

F64 = torch.float64
N = 400
EIGENVALUES = {
    "semicircle": torch.linalg.eigvalsh(normal(N, N) + normal(N, N).T),
    "uniform": torch.linspace(-1, 1, N, dtype=F64),
    "null space, bulk, outliers": joined(
        torch.zeros(N // 2), 0.3 * normal(N // 2 - 12), torch.linspace(3, 40, 12)
    ),
    "null space in the bulk": joined(torch.zeros(N // 2), normal(N // 2)),
    "two clusters": joined(0.05 * normal(N // 2), 1 + 0.02 * normal(N // 2)),
    "few values": torch.tensor([-3.0, 0.0, 0.5, 4.0], dtype=F64).repeat(N // 4),
    "power law of both signs": torch.linspace(1, 30, N, dtype=F64) ** -1
    * (-1.0) ** torch.arange(N),
    "small": normal(40),
    "tiny": torch.tensor([1.0, 3.0, -2.0], dtype=F64),
}


def truth(values, d):
    z = (d.grid[:, None] - values) / d.sigma
    return torch.exp(-0.5 * z**2).mean(1) / (d.sigma * math.sqrt(2 * math.pi))


def matrix(values):
    """The eigenvalues in a random basis of blocks: signs would measure a diagonal exactly."""
    return rotated(
        values[torch.randperm(len(values), generator=torch.Generator().manual_seed(4))], 60
    )


def consistent(d):
    assert bool(
        (d.lower >= 0).all() and (d.lower <= d.values).all() and (d.values <= d.upper).all()
    )
    assert bool(torch.isfinite(d.upper).all())
    step = float(d.grid[-1] - d.grid[0]) / (len(d.grid) - 1)
    assert abs(float(d.values.sum()) * step - 1) < 1e-12


def coverage(values, **options):
    """Share of the points of high truth at which the band holds it, over four seeds."""
    A, inside, high = Dense(matrix(values)), 0, 0
    for seed in range(4):
        d = fh.density(A, seed=seed, **options)
        consistent(d)
        exact = truth(values, d)
        points = exact > 0.2 * exact.max()
        inside += int(((d.lower <= exact) & (exact <= d.upper))[points].sum())
        high += int(points.sum())
    return inside / high


@pytest.mark.parametrize(
    ("steps", "probes", "share"),
    [(30, 1, None), (30, 1, 0.001), (50, 1, None), (50, 1, 0.005), (50, 1, 0.001), (60, 1, None),
     (60, 1, 0.005), (50, 6, None), (50, 6, 0.001)],
)  # fmt: skip
@pytest.mark.parametrize("name", EIGENVALUES)
def test_the_band_holds_the_truth_where_it_is_high(name, steps, probes, share):
    values = EIGENVALUES[name]
    options = {"steps": steps, "probes": probes}
    if share is not None:
        options["sigma"] = share * float(values.max() - values.min())
    assert coverage(values, **options) >= 0.9


@pytest.mark.parametrize("basis", ["none", "compressed"])
def test_other_bases_have_bands_too(basis):
    assert coverage(EIGENVALUES["uniform"], steps=50, basis=basis) >= 0.9
    assert coverage(EIGENVALUES["null space, bulk, outliers"], steps=50, basis=basis) >= 0.9


@pytest.mark.parametrize(("name", "steps"), [("semicircle", 50), ("uniform", 60)])
def test_the_default_width_follows_the_spacing_of_the_nodes(name, steps):
    """Nodes of m steps are pi sin(t) / m half-ranges apart at x = cos(t)."""
    values = EIGENVALUES[name]
    d = fh.density(Dense(matrix(values)), steps=steps)
    half = float(values.max() - values.min()) / 2
    spacing = float(d.nodes[0].diff().max())
    assert 0.5 * spacing <= d.sigma <= spacing <= 1.25 * math.pi / steps * half
    assert float((d.upper - d.lower).max()) < 1.5 * float(d.values.max())  # and the band is of use
    sharp = EIGENVALUES["null space, bulk, outliers"]
    d = fh.density(Dense(matrix(sharp)), steps=50)
    assert d.sigma == pytest.approx(0.005 * float(sharp.max() - sharp.min()), rel=1e-3)


def test_an_isolated_eigenvalue_leaves_the_gaps_beside_it_empty():
    values = joined(torch.zeros(N // 2), 0.3 * normal(N // 2 - 2), [30, 100])
    d = fh.density(Dense(matrix(values)), steps=50, seed=1)
    away = ((d.grid[:, None] - values).abs() > 6 * d.sigma).all(1)
    peak = 1 / (N * d.sigma * math.sqrt(2 * math.pi))  # of one eigenvalue
    assert int(away.sum()) > 100 and float(d.upper[away].max()) < 1e-3 * peak
    at = (d.grid - 100).abs().argmin()
    assert float(d.lower[at]) < peak < float(d.upper[at]) < 30 * peak


@pytest.mark.parametrize("steps", [4, 5, 50])
def test_once_the_space_has_ended_only_the_choice_of_probes_is_in_the_band(steps):
    values = EIGENVALUES["few values"]
    d = fh.density(fh.SymmetricOperator(lambda v: values * v, N, dtype=F64), steps=steps)
    consistent(d)
    assert d.matvecs == 4 and d.sigma == pytest.approx(0.035)
    high = d.values > 0.2 * d.values.max()
    chance = 1.96 * math.sqrt(2 / (N / 4))  # relative, of a quarter of N eigenvalues
    ratios = ((d.upper - d.values) / d.values)[high], ((d.values - d.lower) / d.values)[high]
    assert max(float(r.max()) for r in ratios) < 1.2 * chance
    single = fh.density(Dense(torch.eye(30, dtype=F64)), steps=5)
    consistent(single)
    assert single.matvecs == 1 and single.sigma == pytest.approx(1e-4)


def test_after_one_step_the_band_is_nearly_everything():
    d = fh.density(Dense(matrix(EIGENVALUES["uniform"])), steps=1, sigma=0.1)
    consistent(d)
    exact = truth(EIGENVALUES["uniform"], d)
    assert bool(((d.lower <= exact) & (exact <= d.upper)).all())


def runs(name):
    """A rule of 12 nodes for a measure of known points and weights, and the same made exact."""
    values = EIGENVALUES[name]
    weights = torch.rand(len(values), dtype=F64, generator=torch.Generator().manual_seed(1))
    weights /= weights.sum()
    V, T = [weights.sqrt()], torch.zeros(12, 12, dtype=F64)
    for j in range(12):
        w = values * V[j]
        for _ in range(2):
            for v in V:
                w = w - (v @ w) * v
        T[j, j] = V[j] @ (values * V[j])
        if j < 11:
            T[j, j + 1] = T[j + 1, j] = w.norm()
            V.append(w / w.norm())
    return values, weights, T


@pytest.mark.parametrize(
    "name", ["semicircle", "uniform", "null space, bulk, outliers", "two clusters", "small"]
)
def test_the_christoffel_function_bounds_the_distribution_function(name):
    values, weights, T = runs(name)
    rule = quadrature(T, False)
    low, high = float(values.min()), float(values.max())
    x = torch.linspace(low - 0.1 * (high - low), high + 0.1 * (high - low), 997, dtype=F64)
    true = (weights * (values <= x[:, None])).sum(1)
    found = (rule.weights * (rule.nodes <= x[:, None])).sum(1)
    bound = christoffel(rule, x)
    assert bool(((true - found).abs() <= bound + 1e-12).all())
    assert float((true - found).abs().max()) > 0.2 * float(bound.max())  # not far too large
    torch.testing.assert_close(christoffel(rule, rule.nodes), rule.weights, rtol=1e-6, atol=1e-12)
    inner = torch.linspace(float(rule.nodes[0]), float(rule.nodes[-1]), 20001, dtype=F64)
    integral = float(christoffel(rule, inner).mean() * (inner[-1] - inner[0]))
    assert width(rule) == pytest.approx(integral, rel=0.02)
    assert not christoffel(rule._replace(exact=True), x).any()


@pytest.mark.parametrize("name", ["uniform", "null space, bulk, outliers", "two clusters", "small"])
def test_a_kernel_finer_than_the_nodes_is_within_the_bound_for_any_measure(name):
    """The measure of one probe with known weights that are not smooth: nothing is random."""
    values, weights, T = runs(name)
    rule = quadrature(T, False)
    sigma = float(rule.nodes.diff().min()) / 10
    grid = torch.arange(float(values.min()) - sigma, float(values.max()) + sigma, sigma / 4)

    def smooth(points, mass):
        z = (grid[:, None] - points) / sigma
        return (mass * torch.exp(-0.5 * z**2)).sum(1) / (sigma * math.sqrt(2 * math.pi))

    off = (smooth(values, weights) - smooth(rule.nodes, rule.weights)).abs()
    bound = unresolved(rule, grid.double(), sigma)
    assert float((off <= 1.1 * bound + 1e-9 * off.max()).double().mean()) > 0.999
