"""The trace with a random vector for every batch: values, intervals, and when it is chosen."""

import math

import pytest
import torch
from torch import nn

import fasthessian as fh
from fasthessian import kernels
from fasthessian.checkpoints import keeper
from fasthessian.krylov.per_batch import ENOUGH
from fasthessian.operators.request import Batches
from tests.support.bits import digest
from tests.support.models import F64, columns, each_curvature, refused
from tests.support.spectra import Dense, normal

PER_BATCH = {"method": "hutchinson", "sampling": "per-batch"}


def mlp(batches=18, size=4, width=4):
    """A network, and batches of which the last is smaller."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, 2)).double()
    sizes = [size] * (batches - 1) + [size - 1]
    data = [(torch.randn(k, 3).double(), torch.randint(2, (k,))) for k in sizes]
    return model, nn.CrossEntropyLoss(), data


def hessian(batches=18, **options):
    return fh.Hessian(*mlp(batches), **options)


def signs(A, seed, sample):
    v = torch.empty(A.n, dtype=F64)
    kernels.select(A.device).signs_(v, seed, sample * A.n)
    return v


class BatchesOf(Dense):
    """The sum of dense matrices (N, n, n) of batches of these weights, which are in them."""

    def __init__(self, parts, weights):
        super().__init__(parts.sum(0))
        self.parts, self.weights = parts, weights

    def _batches(self):
        return Batches(0, len(self.parts), len(self.parts))

    def _multiply(self, requests):
        for request in requests:
            each = request.each_part
            for H, weight in zip(self.parts, self.weights, strict=True):
                each.begin()
                torch.mm(request.V, H, out=each.product)
                each.end(weight)


def one_hot(b, count):
    return [float(i == b) for i in range(count)]


@each_curvature
def test_the_value_is_the_sum_over_batches_of_quadratic_forms_of_vectors_of_their_own(curvature):
    """Against the matrices of single batches; the share of weight decay is exact."""
    model, criterion, data = mlp()
    N, total = len(data), sum(len(y) for _, y in data)
    A = curvature(model, criterion, data, weight_decay=0.1)
    parts = [columns(curvature(model, criterion, data, weights=one_hot(b, N))) for b in range(N)]
    want = []
    for number in (0, 1):
        vectors = [signs(A, 7, number * N + b) for b in range(N)]
        terms = zip(vectors, parts, data, strict=True)
        forms = [float(v @ H @ v) * len(y) / total for v, H, (_, y) in terms]
        want.append(sum(forms) + 0.1 * A.n)
    once = fh.trace(A, **PER_BATCH, rtol=0.99, seed=7)
    assert once.matvecs == 1 and len(once.samples) == N
    assert once.value == pytest.approx(want[0], rel=1e-10)
    with pytest.warns(fh.ConvergenceWarning, match="after 2 products"):
        twice = fh.trace(A, **PER_BATCH, rtol=1e-9, max_matvecs=2, seed=7)
    assert twice.value == pytest.approx(sum(want) / 2, rel=1e-10) and not twice.converged
    assert float(twice.samples.mean()) == pytest.approx(twice.value)


def test_deflation_takes_its_part_of_every_batch():
    A = hessian(weight_decay=0.1)
    pairs = fh.eigsh(A, 3, tol=1e-9)
    P = torch.eye(A.n, dtype=F64) - pairs.vectors.T @ pairs.vectors
    model, criterion, data = mlp()
    value = float(pairs.values.sum()) + 0.1 * (A.n - 3)
    for b in range(18):
        H = columns(fh.Hessian(model, criterion, data, weights=one_hot(b, 18)))
        v = P @ signs(A, 0, b)
        value += float(v @ H @ v) * len(data[b][1]) / 71
    found = fh.trace(A, **PER_BATCH, deflate=pairs, rtol=0.99)
    assert found.matvecs == 1 and found.value == pytest.approx(value, rel=1e-9)
    assert found.stderr < fh.trace(A, **PER_BATCH, rtol=0.99).stderr
    # "auto" deflates with the same vectors for all batches
    assert len(fh.trace(A, method="hutchinson", deflate=pairs, rtol=0.5).samples) == 16


def test_microbatches_are_batches():
    whole = [tuple(torch.cat(column) for column in zip(*mlp()[2], strict=True))]
    model, criterion, _ = mlp()
    cut = fh.trace(fh.Hessian(model, criterion, whole, microbatch=4), **PER_BATCH, rtol=0.9)
    assert cut.value == pytest.approx(fh.trace(hessian(), **PER_BATCH, rtol=0.9).value, rel=1e-10)


def low_rank(count, rank, n=60):
    """Batches of different size that share most of their eigenvectors, and a diagonal."""
    U = normal(n, rank) + 0.7 * torch.stack([normal(n, rank, seed=b + 1) for b in range(count)])
    weights = torch.linspace(1, 2, count, dtype=F64)
    weights /= weights.sum()
    parts = U @ U.mT / n + 2 * torch.diag(torch.linspace(0, 1, n, dtype=F64))
    return BatchesOf(weights[:, None, None] * parts, weights.tolist())


@pytest.mark.parametrize(("count", "rank", "passes"), [(40, 1, 1), (20, 4, 1), (3, 1, 7)])
def test_over_many_seeds_the_mean_is_the_trace_and_the_interval_covers_it(count, rank, passes):
    A, seeds = low_rank(count, rank), 400
    truth, values, covered, errors = float(A.M.trace()), [], 0, []
    for seed in range(seeds):
        found = fh.trace(A, **PER_BATCH, rtol=0.9, seed=seed)
        assert found.matvecs == passes
        values.append(found.value)
        errors.append(found.stderr**2)
        covered += found.interval[0] <= truth <= found.interval[1]
    spread = float(torch.tensor(values).std())
    assert abs(sum(values) / seeds - truth) <= 3 * spread / math.sqrt(seeds)
    assert abs(covered / seeds - 0.95) <= 3 * math.sqrt(0.95 * 0.05 / seeds)
    # the variance is known to 7 %, and without the common diagonal it would be twice as large
    assert math.sqrt(sum(errors) / seeds) == pytest.approx(spread, rel=0.12)


def test_a_diagonal_that_all_batches_share_adds_no_variance():
    """Whatever their weights are: each sample has the Hessian 2/50 diag(x^2)."""

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.factor = nn.Parameter(torch.ones(50, dtype=F64))

        def forward(self, x):
            return self.factor * x

    x = torch.linspace(1, 2, 50, dtype=F64)
    data = [(x.expand(k, -1), torch.zeros(k, 50, dtype=F64)) for k in range(1, 30)]
    found = fh.trace(fh.Hessian(Scale(), nn.MSELoss(), data), **PER_BATCH, rtol=1e-6)
    assert found.matvecs == 1 and found.stderr < 1e-6
    assert found.value == pytest.approx(2 / 50 * float(x.square().sum()), rel=1e-12)


def test_passes_are_made_until_the_interval_is_narrow_or_the_diagonal_is_cheaper():
    A = hessian()
    truth = float(columns(A).trace())
    found = fh.trace(A, **PER_BATCH, rtol=0.3)
    low, high = found.interval
    assert found.converged and 1 < found.matvecs < A.n and len(found.samples) == 18 * found.matvecs
    assert (high - low) / 2 <= 0.3 * found.value and low <= truth <= high
    exact = fh.trace(A, sampling="per-batch", rtol=1e-4)
    assert exact.value == pytest.approx(truth, rel=1e-10) and exact.stderr == 0.0
    assert exact.matvecs == A.n + 1  # one pass told that samples would take more


def test_auto_takes_a_vector_for_every_batch_from_16_batches_on():
    for batches, chosen in ((ENOUGH - 1, "whole"), (ENOUGH, "per-batch")):
        A = hessian(batches)
        auto = fh.trace(A, method="hutchinson", rtol=0.5)
        assert digest(auto) == digest(
            fh.trace(A, method="hutchinson", rtol=0.5, sampling=chosen)
        ), batches
    model, criterion, data = mlp(width=1)  # 8 parameters
    small = fh.trace(fh.Hessian(model, criterion, data))
    assert small.stderr == 0.0 and small.matvecs == small.samples.numel() * 8


def test_blocks_and_the_whole_matrix_share_the_passes():
    """With vectors of their own: each has the bits of a run by itself."""
    model, criterion, data = mlp()
    passes = []

    class Loader:
        def __iter__(self):
            passes.append(1)
            return iter(data)

    A = fh.GaussNewton(model, criterion, Loader(), engine="recompute")
    operators = {"": A, **A.blocks("layer")}
    before = len(passes)
    found = fh.trace(operators, **PER_BATCH, rtol=0.9)
    assert list(found) == ["", "0", "2"] and all(each.matvecs == 1 for each in found.values())
    assert len(passes) - before <= 2  # one may poll the data for changes
    for name, B in operators.items():
        assert digest(fh.trace(B, **PER_BATCH, rtol=0.9)) == digest(found[name])
    truth, blocks = columns(A), {"0": slice(0, 16), "2": slice(16, 26)}
    for name, place in blocks.items():
        low, high = found[name].interval
        assert low <= float(truth[place, place].trace()) <= high


def test_progress_is_reported_after_every_batch_with_a_total():
    seen = []
    found = fh.trace(
        hessian(), **PER_BATCH, rtol=0.3, progress=lambda made, total: seen.append((made, total))
    )
    made = [made for made, _ in seen]
    assert made == sorted(made) and set(made) == set(range(1, 18 * found.matvecs + 1))
    assert all(total >= done for done, total in seen)
    assert seen[-1] == (18 * found.matvecs,) * 2


def test_in_inference_mode_the_numbers_are_the_same():
    A = hessian()
    want = digest(fh.trace(A, **PER_BATCH, rtol=0.5))
    with torch.inference_mode():
        assert digest(fh.trace(A, **PER_BATCH, rtol=0.5)) == want


def test_an_operator_without_several_batches_is_refused_in_one_line():
    model, criterion, data = mlp()
    words = "sampling must be 'auto' or 'whole' for an operator of one batch or none"
    for A in (
        Dense(torch.eye(30, dtype=F64)),
        fh.Hessian(model, criterion, data[0]),
        fh.Hessian.from_closure(lambda: (model(data[0][0]) ** 2).sum(), [*model.parameters()]),
    ):
        refused(lambda A=A: fh.trace(A, sampling="per-batch"), ValueError, words)
        fh.trace(A, sampling="whole")
    blocks = fh.Hessian(model, criterion, data[0]).blocks("layer")
    refused(lambda: fh.trace(blocks, sampling="per-batch"), ValueError, f"^0: {words}")
    fh.trace(fh.Hessian(model, criterion, data), sampling="per-batch")
    refused(lambda: fh.trace(A, sampling="each"), ValueError, "sampling must be one of auto, who")


def test_a_checkpoint_of_other_batches_is_refused(tmp_path, monkeypatch):
    """The vectors that were used belong to them."""
    monkeypatch.setattr(keeper, "INTERVAL", 0.0)
    monkeypatch.setattr(keeper, "SHARE", 1e9)

    def stop(made, total):
        if made > 36:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fh.trace(hessian(), **PER_BATCH, rtol=0.3, checkpoint=tmp_path / "run", progress=stop)
    model, criterion, data = mlp()
    together = [tuple(torch.cat(column) for column in zip(*data[:2], strict=True)), *data[2:]]
    other = fh.Hessian(model, criterion, together)
    words = "A must have 18 batches as in the checkpoint, got 17"
    refused(lambda: fh.resume(tmp_path / "run", other), ValueError, words)
    fh.resume(tmp_path / "run", hessian())
