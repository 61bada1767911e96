"""The trace: how often its interval covers, exact traces, and the variance taken from products."""

import math

import pytest
import torch

import fasthessian as fh
from fasthessian.krylov.intervals import Spread, student_t
from tests.support.spectra import Dense, joined, normal, rotated

F32, F64 = torch.float32, torch.float64
pytestmark = pytest.mark.filterwarnings("ignore::fasthessian.ConvergenceWarning")


def spiked(u):
    """A diagonal and one strong direction: its samples have the skewness of chi^2_1."""
    return torch.diag(normal(len(u), seed=5).abs()) + 40 * torch.outer(u, u) / (u @ u)


N = 120
ONES = torch.cat((torch.ones(N // 2, dtype=F64), -torch.ones(N // 2, dtype=F64)))
MATRICES = {
    "dense, outliers": rotated(joined([90, 60, 40, 30, 20], 0.1 * normal(N - 5))),
    "low rank": rotated(joined([2, 1.5, 1.2, 1, 1, 0.8], torch.zeros(N - 6))),
    "bulk and outliers": rotated(joined([20, 12, 8, 5, 3, 2], 0.1 * normal(N - 6).abs() - 0.03)),
    "power law": rotated(torch.arange(1, N + 1, dtype=F64) ** -1),
    "localised power law": rotated(torch.arange(1, N + 1, dtype=F64) ** -1, 6),
    "uniform": rotated(torch.linspace(0, 1, N)),
    "both signs": rotated(ONES + 0.3),
    "dense rank one": spiked(normal(N, seed=9)),
    "rank one on five": spiked(joined([0.8, 0.4, 0.4, 0.2, 0.1], torch.zeros(N - 5))),
    "small": rotated(normal(30) + 1),
}
SYMMETRIC = ("uniform", "both signs", "small")  # samples of little skewness
SEEDS = 300
OFF = 3.5 * math.sqrt(0.95 * 0.05)  # over sqrt(seeds): once in 2000 counts


def hits(M, seeds, **options):
    truth, found = float(M.trace()), 0
    for seed in range(seeds):
        low, high = fh.trace(Dense(M), seed=seed, method="hutchinson", **options).interval
        found += low <= truth <= high
    return found


@pytest.mark.parametrize("rtol", [0.2, 0.8])
def test_the_interval_covers_where_samples_are_skewed_and_where_it_stops_early(rtol):
    """The sample variance covers 89 to 93 % on the skewed ones, 92 % together."""
    found = {name: hits(M, SEEDS, rtol=rtol) for name, M in MATRICES.items()}
    for name, count in found.items():
        assert abs(count / SEEDS - 0.95) <= OFF / math.sqrt(SEEDS), name
    skewed = [count for name, count in found.items() if name not in SYMMETRIC]
    total = SEEDS * len(skewed)
    assert abs(sum(skewed) / total - 0.95) <= OFF / math.sqrt(total)


@pytest.mark.parametrize("confidence", [0.8, 0.99])
def test_other_confidences_cover_too(confidence):
    seeds = 80
    found = sum(hits(M, seeds, rtol=0.3, confidence=confidence) for M in MATRICES.values())
    count = seeds * len(MATRICES)
    spread = math.sqrt(confidence * (1 - confidence) / count)
    assert abs(found / count - confidence) <= 3.5 * spread


@pytest.mark.parametrize("limit", [4, 9, 13])
def test_the_interval_covers_where_products_run_out(limit):
    """9 leaves a block of one sample, which has no spread of its own."""
    found = sum(hits(M, 80, rtol=1e-6, max_matvecs=limit) for M in MATRICES.values())
    count = 80 * len(MATRICES)
    assert abs(found / count - 0.95) <= OFF / math.sqrt(count) + 0.01


@pytest.mark.parametrize("k", [1, 3])
def test_deflated_and_from_spectrum_it_covers(k):
    found = whole = 0
    for M in MATRICES.values():
        pairs = fh.eigsh(Dense(M), k, "LA")
        found += hits(M, 80, rtol=0.2, deflate=pairs)
        for seed in range(20):
            low, high = fh.spectrum(Dense(M), (k, 0), steps=12, rtol=0.3, seed=seed).trace.interval
            whole += low <= float(M.trace()) <= high
    count = 80 * len(MATRICES)
    assert abs(found / count - 0.95) <= OFF / math.sqrt(count)
    assert whole / (20 * len(MATRICES)) >= 0.95 - OFF / math.sqrt(20 * len(MATRICES))


def test_a_trace_of_zero_is_not_taken_for_another_one_at_one_of_many_looks():
    """Half-width over |mean| falls below 0.95 sooner or later by chance, at 1.96 / 0.95 errors."""
    assert hits(rotated(ONES), 200, rtol=0.95, max_matvecs=300) >= 200 * 0.95 - OFF * math.sqrt(200)


def test_the_spread_is_the_variance_of_the_theory():
    """2 ||B||_F^2, B without its diagonal, to the relative error 2 / s of its own worst case."""
    for M in MATRICES.values():
        V = torch.where(normal(4000, len(M), seed=3) < 0, -1.0, 1.0).to(F64)
        y, spread = V * (V @ M), Spread()
        for rows in y.split(8):
            shifted = rows - rows[0]
            spread.add(shifted @ shifted.T)
        stderr, _ = spread.interval(y.sum(1), 0.95)
        true = 2 * float((M - M.diag().diag()).square().sum()) / 4000
        assert abs(stderr**2 / true - 1) <= 3.5 * math.sqrt(2 / 3500)
        assert abs(float(y.sum(1).var()) / 4000 / true - 1) <= 3.5 * math.sqrt(14 / 4000)


def test_products_that_differ_from_call_to_call_widen_the_interval():
    """The theory sees the vectors of a product only, not that the matrix is another one."""
    drawn = torch.Generator().manual_seed(0)

    def noisy(v):
        return v * (1 + 0.1 * torch.randn(1, generator=drawn, dtype=F64))

    found = 0
    for seed in range(200):
        A = fh.SymmetricOperator(noisy, 400, dtype=F64, check=False)
        low, high = fh.trace(A, seed=seed, rtol=0.3).interval
        found += low <= 400 <= high
    assert found >= 200 * 0.95 - OFF * math.sqrt(200)


def test_students_quantile_is_exact_for_few_degrees_of_freedom():
    stats = pytest.importorskip("scipy.stats")
    for confidence in (0.01, 0.5, 0.8, 0.95, 0.99, 0.999):
        for df in (*range(1, 32), 100, 10**4, 10**9):
            want = stats.t.ppf((1 + confidence) / 2, df)
            close = 1e-10 if df < 30 else 2e-6
            assert student_t(confidence, df) == pytest.approx(want, rel=close), (confidence, df)


def exactly(found, M, products):
    """An exact trace: its interval is rounding, and holds the trace of M in float64."""
    low, high = found.interval
    truth = float(M.double().trace())
    assert low <= truth <= high and low <= found.value <= high and found.converged
    eps = torch.finfo(M.dtype).eps
    assert high - low <= 64 * eps * math.sqrt(len(M)) * float(M.double().norm())
    assert found.stderr == 0 and found.samples.tolist() == [found.value]
    assert found.matvecs == products


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 16])
def test_up_to_16_products_give_the_trace_exactly(n, dtype):
    M = rotated(normal(n)).to(dtype)
    for options in (
        {},
        {"rtol": 1e-9},
        {"rtol": 0.9, "confidence": 0.5},
        {"max_matvecs": max(n, 2)},
    ):
        exactly(fh.trace(Dense(M), **options), M, n)
    pairs = fh.eigsh(Dense(M), 1)
    exactly(fh.trace(Dense(M), deflate=pairs), M, n if n > 1 else 0)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_the_trace_is_exact_where_samples_would_cost_more(dtype):
    M = rotated(normal(90) + 0.5).to(dtype)
    calls, A = [], Dense(M)
    exactly(fh.trace(A, progress=lambda *c: calls.append(c)), M, 16 + 90)
    assert A.matvecs == 106 and calls[-1] == (106, 106) and len(calls) == 2 + 12
    exactly(fh.trace(Dense(M), rtol=1e-9, max_matvecs=106), M, 106)
    zero = torch.eye(60, dtype=dtype).flip(0)
    exactly(fh.trace(Dense(zero)), zero, 16 + 60)
    for options in ({"rtol": 0.9}, {"method": "hutchinson"}, {"rtol": 1e-9, "max_matvecs": 105}):
        found = fh.trace(Dense(M), **options)
        assert found.stderr > 0 and len(found.samples) == found.matvecs != 106
        assert found.value == pytest.approx(float(found.samples.mean()))
    exactly(fh.trace(Dense(M), deflate=fh.eigsh(Dense(M), 2)), M, 16 + 90)


def test_hutchinson_asked_for_stays_hutchinson_on_the_smallest():
    M = rotated(normal(5))
    found = fh.trace(Dense(M), method="hutchinson", rtol=0.5)
    assert len(found.samples) == found.matvecs >= 16 and found.stderr > 0


@pytest.mark.parametrize("dtype", [F32, F64])
def test_all_eigenpairs_give_the_trace_without_a_product(dtype):
    M = rotated(normal(25) + 0.2).to(dtype)
    A = Dense(M)
    pairs = fh.eigsh(A, 25, "LA")
    made = A.matvecs
    exactly(fh.trace(A, deflate=pairs), M, 0)
    assert A.matvecs == made


@pytest.mark.parametrize("probes", [1, 2])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_a_krylov_run_through_the_whole_space_knows_the_trace(dtype, probes):
    for M in (rotated(normal(50)).to(dtype), torch.eye(40, dtype=dtype).flip(0)):
        n = len(M)
        s = fh.spectrum(Dense(M), (3, 3), steps=n, probes=probes)
        exactly(s.trace, M, 0)
    s = fh.spectrum(Dense(rotated(normal(50)).to(dtype)), (3, 3), steps=50, basis="compressed")
    assert s.trace.matvecs > 0  # rows orthogonal to 1e-3 do not have the trace in their T


def test_small_blocks_are_exact_and_large_ones_sampled():
    large = rotated(torch.linspace(1, 2, 300))
    layers = {"small": rotated(normal(9)), "middle": rotated(normal(40)), "large": large}
    found = fh.trace({name: Dense(M) for name, M in layers.items()})
    exactly(found["small"], layers["small"], 9)
    exactly(found["middle"], layers["middle"], 56)
    assert len(found["large"].samples) == found["large"].matvecs == 16
    for name, M in layers.items():
        alone = fh.trace(Dense(M))
        assert alone.value == found[name].value and torch.equal(alone.samples, found[name].samples)


def test_exact_traces_of_models_and_their_layers():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    x, y = torch.randn(20, 3), torch.randint(2, (20,))
    H = fh.Hessian(model, torch.nn.CrossEntropyLoss(), (x, y))
    dense = (H @ torch.eye(H.n)).double()
    exactly(fh.trace(H, rtol=0.01), dense.to(F32), 16 + H.n)
    traces = fh.trace(H.blocks("layer"), rtol=0.01)
    whole = sum(t.value for t in traces.values())
    assert whole == pytest.approx(float(dense.trace()), rel=1e-5)
    assert [traces[name].matvecs for name in ("0", "2")] == [16, 10]
