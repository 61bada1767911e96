"""Landscapes: blocks of points, directions, spans, and what is refused."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fasthessian as fh
from fasthessian.algorithms import directions as module
from fasthessian.algorithms import landscape as points_of

F32, F64 = torch.float32, torch.float64
H = torch.tensor([[3.0, 1.0, 0.5], [1.0, 2.0, 0.0], [0.5, 0.0, 1.0]], dtype=F64)


def quadratic(dtype=F64):
    """0.5 x'Hx at x = (0.5, -1, 2)."""
    x = torch.tensor([0.5, -1.0, 2.0], dtype=dtype, requires_grad=True)
    return fh.Hessian.from_closure(lambda: 0.5 * x @ H.to(dtype) @ x, {"x": x}), x


def convolutions(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3)
        ).double()


def batches():
    x = torch.randn(7, 1, 4, 4, generator=torch.Generator().manual_seed(3), dtype=F64)
    return [(x[:4], torch.arange(4) % 3), (x[4:], torch.arange(3))]


def network(data=None, **options):
    data = batches() if data is None else data
    return fh.Hessian(convolutions(), nn.CrossEntropyLoss(), data, **options)


def random(A, k, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(k, A.n, dtype=A.dtype, generator=generator)


# blocks of points


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_losses_of_a_block_have_the_bits_of_single_ones(mode):
    A = network(mode=mode, weight_decay=0.1)
    V = 0.1 * random(A, 5)
    before = A.theta()
    found = A.losses(V)
    assert found.dtype == F64 and found.tolist() == [A.loss(v) for v in V]
    assert len(set(found.tolist())) == 5 and torch.equal(A.theta(), before)
    assert A.losses(V[:0]).shape == (0,)
    with pytest.raises(ValueError, match=r"offsets must have shape \(b, "):
        A.losses(V[0])


class Reads(TensorDataset):
    count = 0

    def __getitem__(self, i):
        self.count += 1
        return super().__getitem__(i)


def test_a_pass_over_the_data_serves_several_points():
    x = torch.randn(6, 1, 4, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    data = Reads(x, torch.arange(6) % 3)
    A = network(data=DataLoader(data, batch_size=3))
    V, data.count, seen = random(A, 2), 0, []
    found = fh.landscape(A, V, 0.1, 5, progress=lambda *made: seen.append(made))
    assert seen == [(made, 25) for made in (1, 3, 7, 15, 25)]
    assert data.count <= 6 * (len(seen) + 2)  # two passes at the start compare the data
    assert float(found.losses[1, 3]) == A.loss(-0.05 * V[0] + 0.05 * V[1])


def test_blocks_grow_while_passes_are_brief_or_get_cheaper():
    ranks = points_of.Ranks()

    def sizes(cost, most=16):
        block, found = points_of._Block(), []
        for _ in range(6):
            found.append(block.points)
            block.adapt(cost(block.points) / block.points, most, ranks)
        return found

    assert sizes(lambda b: 0.01 * b) == [1, 2, 4, 8, 16, 16]
    assert sizes(lambda b: 0.01 * b, most=3) == [1, 2, 3, 3, 3, 3]
    assert sizes(lambda b: 5.0 * b) == [1, 2, 2, 2, 2, 2]  # computing takes the time
    assert sizes(lambda b: 60.0 + b) == [1, 2, 4, 8, 16, 16]  # reading does


def test_memory_limits_the_points_of_a_pass(monkeypatch):
    A, _ = quadratic()
    monkeypatch.setattr(points_of, "ROOM", 2 * 2 * 3 * 8)
    seen = []
    fh.landscape(A, torch.eye(3, dtype=F64)[0], points=6, progress=lambda m, _: seen.append(m))
    assert seen == [1, 3, 5, 6]


# directions


def test_filters_of_random_directions_have_the_norms_of_the_weights():
    A = network()
    V = fh.filter_normalized(A, 3)
    theta = A.unflatten(A.theta())
    assert V.shape == (3, A.n) and V.dtype == F64
    for v in V:
        for name, piece in A.unflatten(v).items():
            if piece.dim() < 2:
                assert not piece.any(), name
                continue
            norms = piece.flatten(1).norm(dim=1)
            torch.testing.assert_close(norms, theta[name].flatten(1).norm(dim=1))
    assert torch.equal(V[:2], fh.filter_normalized(A))
    assert not torch.equal(V, fh.filter_normalized(A, 3, seed=1))
    kernel = A.unflatten(V[0])["0.weight"], A.unflatten(V[1])["0.weight"]
    assert abs(float(torch.cosine_similarity(*(k.flatten() for k in kernel), dim=0))) < 0.9


def test_given_directions_are_normalised_by_filter():
    A = network()
    given = random(A, 1)
    before = given.clone()
    A.unflatten(given[0])["3.weight"][1] = 0  # a filter without a direction stays zero
    before = given.clone()
    V = fh.filter_normalized(A, given[0])
    assert torch.equal(given, before) and V.shape == (1, A.n)
    weight, given = A.unflatten(V[0])["3.weight"], A.unflatten(given[0])["3.weight"]
    assert not weight[1].any() and bool(weight.isfinite().all())
    for i in (0, 2):
        assert float(torch.cosine_similarity(weight[i], given[i], dim=0)) > 1 - 1e-12
        norm = float(A.unflatten(A.theta())["3.weight"][i].norm())
        assert float(weight[i].norm()) == pytest.approx(norm)


def test_a_complex_bias_is_not_a_filter():
    layer = nn.Linear(2, 3, dtype=torch.complex128)
    x = torch.ones(4, 2, dtype=torch.complex128)
    A = fh.Hessian(layer, lambda z, y: z.abs().square().mean(), (x, x))
    V = A.unflatten(fh.filter_normalized(A, 1)[0])
    assert not V["bias"].any() and V["weight"].shape == (3, 2, 2)
    norms = layer.weight.detach().abs().square().sum(1).sqrt()
    torch.testing.assert_close(V["weight"].flatten(1).norm(dim=1), norms)


def test_interpolation_joins_two_models_and_keeps_the_buffers_of_the_first():
    A, other = network(), convolutions(1)
    with torch.no_grad():
        other[1].running_mean += 3.0
    d = fh.toward(A, other)
    assert torch.equal(d, fh.toward(A, other.state_dict()))
    vector = torch.cat([p.detach().flatten() for p in other.parameters()])
    assert torch.equal(d, fh.toward(A, vector)) and torch.equal(d, vector - A.theta())
    line = fh.landscape(A, d, span=(-0.5, 1.5), points=5)
    assert line.alphas.tolist() == [-0.5, 0.0, 0.5, 1.0, 1.5] and line.losses[1] == A.loss()
    for name, buffer in convolutions().named_buffers():
        other.get_buffer(name).copy_(buffer)
    there = fh.Hessian(other, nn.CrossEntropyLoss(), batches())
    assert float(line.losses[3]) == pytest.approx(there.loss(), rel=1e-12)


def path_of(A, t, seed=0):
    """A walk of t checkpoints that ends at theta, as vectors (t, n)."""
    steps = random(A, t, seed)
    return A.theta() + 0.1 * (steps.cumsum(0) - steps.sum(0))


@pytest.mark.parametrize("t", [3, 8, 9, 20])
def test_the_plane_of_a_trajectory_is_that_of_a_dense_svd(t):
    A = network()
    points = path_of(A, t)
    path = fh.trajectory(A, points)
    centred = points - points.mean(0)
    _, s, Vh = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(path.ratios, s[:2] ** 2 / (s**2).sum())
    torch.testing.assert_close(path.directions @ path.directions.T, torch.eye(2, dtype=F64))
    torch.testing.assert_close((path.directions @ Vh[:2].T).abs(), torch.eye(2, dtype=F64))
    want = (points - A.theta()) @ path.directions.T
    torch.testing.assert_close(path.coordinates, want)
    assert bool((path.coordinates[0] >= 0).all()) and path.coordinates[-1].abs().max() < 1e-12
    assert torch.equal(path.coordinates, fh.trajectory(A, points).coordinates)


class Stored:
    """Checkpoints that are read anew at each pass, as float32 state dicts with buffers."""

    def __init__(self, states):
        self.states, self.reads = states, 0

    def __iter__(self):
        for state in self.states:
            self.reads += 1
            yield {name: t.float() if t.is_floating_point() else t for name, t in state.items()}


def test_checkpoints_are_read_one_at_a_time():
    A = network()
    models = [convolutions(seed) for seed in range(1, 17)]
    whole = fh.trajectory(A, models)
    stored = Stored([model.state_dict() for model in models])
    path = fh.trajectory(A, stored)
    torch.testing.assert_close(path.coordinates, whole.coordinates, rtol=1e-6, atol=1e-6)
    assert path.directions.dtype == F64 and stored.reads == 3 * 16


def test_float32_directions_of_unequal_variance_are_orthonormal():
    A, x = quadratic(F32)
    t = torch.linspace(1, 0, 7)
    points = x.detach() + torch.stack((1e2 * t, 1e-3 * t**2, t * 0), 1)
    path = fh.trajectory(A, points)
    V = path.directions.double()
    assert float((V @ V.T - torch.eye(2)).abs().max()) < 1e-6
    assert path.directions.dtype == F32 and float(path.ratios[0]) > 0.999


def test_a_landscape_of_a_trajectory_holds_all_of_it():
    A, x = quadratic()
    points = x.detach() + torch.tensor([[4.0, 0, 0], [1, 1, 0], [0, 0.5, 0], [0, 0, 0]]).double()
    path = fh.trajectory(A, points)
    found = fh.landscape(A, path, points=4)
    assert torch.equal(found.trajectory, path.coordinates.T)
    for axis, row in ((found.alphas, found.trajectory[0]), (found.betas, found.trajectory[1])):
        length = float(row.max() - row.min())
        assert float(axis[0]) == pytest.approx(float(row.min()) - 0.15 * length)
        assert float(axis[-1]) == pytest.approx(float(row.max()) + 0.15 * length)
    at = x.detach() + found.alphas[3] * path.directions[0] + found.betas[1] * path.directions[1]
    assert float(found.losses[3, 1]) == pytest.approx(float(0.5 * at @ H @ at), rel=1e-12)
    assert fh.landscape(A, path.directions, points=2).trajectory.shape == (2, 0)


def test_a_landscape_of_a_trajectory_is_resumed(tmp_path):
    A, x = quadratic()
    path = fh.trajectory(A, x.detach() + torch.eye(3, dtype=F64))
    want, folder = fh.landscape(A, path, ((-1, 2), (0, 1)), 5), tmp_path / "run.fh"

    def stop(made, _):
        if made > 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fh.landscape(A, path, ((-1, 2), (0, 1)), 5, checkpoint=folder, progress=stop)
    for _ in range(2):  # the second call finds the saved result
        found = fh.resume(folder, A)
        assert torch.equal(found.losses, want.losses)
        assert torch.equal(found.trajectory, want.trajectory)


def test_ranges_of_the_grid():
    A, _ = quadratic()
    d = torch.eye(3, dtype=F64)[:2]
    for span, ends in (
        (None, [(-1, 1), (-1, 1)]), (2, [(-2, 2), (-2, 2)]), ((0, 3), [(0, 3), (0, 3)]),
        ([(-1, 0), [2, 5]], [(-1, 0), (2, 5)]),
    ):  # fmt: skip
        found = fh.landscape(A, d, span, 3)
        assert [(float(x[0]), float(x[-1])) for x in (found.alphas, found.betas)] == ends


# bad input

X = torch.tensor([0.5, -1.0, 2.0], dtype=F64)
CALLS = [
    (lambda A: fh.landscape(A, X, 0), ValueError, "span must be a finite positive number, got 0"),
    (lambda A: fh.landscape(A, X, (1, 0)), ValueError, r"low < high, got \(1, 0\)"),
    (lambda A: fh.landscape(A, X, (1, 1)), ValueError, r"low < high, got \(1, 1\)"),
    (lambda A: fh.landscape(A, X, (0, math.inf)), ValueError, "with low < high"),
    (lambda A: fh.landscape(A, X, (0, "b")), ValueError, "with low < high"),
    (lambda A: fh.landscape(A, X, (1, 2, 3)), ValueError, "with low < high"),
    (lambda A: fh.landscape(A, X, ()), ValueError, "with low < high"),
    (lambda A: fh.landscape(A, X, ((0, 1), (0, 1))), ValueError, "with low < high, got"),
    (lambda A: fh.landscape(A, torch.stack((X, X)), ((0, 1), 2)), ValueError, "two of them"),
    (lambda A: fh.landscape(A, X, "wide"), TypeError, "span must be a number, got 'wide'"),
    (lambda A: fh.landscape(A, [X]), TypeError, "directions must be a tensor or a Trajectory"),
    (lambda A: fh.toward(A, [X]), TypeError, "other must be a state dict, a vector"),
    (lambda A: fh.toward(A, X[:2]), ValueError, r"other must have shape \(3,\), got \(2,\)"),
    (lambda A: fh.toward(A, {"y": X, "z": X}), ValueError, "none for 'x' among 'y', 'z'"),
    (lambda A: fh.toward(A, {"x": X[:1]}), ValueError, r"other must have shape \(3,\) for 'x'"),
    (lambda A: fh.toward(A, X / 0), ValueError, "other holds NaN or Inf"),
    (lambda A: fh.toward(torch.eye(3), X), TypeError, "A must know its loss"),
    (lambda A: fh.trajectory(A, [X]), ValueError, "points must be three or more, got 1"),
    (lambda A: fh.trajectory(A, []), ValueError, "points must be three or more, got 0"),
    (lambda A: fh.trajectory(A, [X, 2 * X, 5 * X]), ValueError, "the 3 given lie on one line"),
    (lambda A: fh.trajectory(A, [X] * 4), ValueError, "the 4 given lie on one line"),
    (lambda A: fh.trajectory(A, [X, X, X / 0]), ValueError, r"points\[2\] holds NaN or Inf"),
    (lambda A: fh.trajectory(A, {"x": X}), TypeError, r"points\[0\] must be a state dict"),
    (lambda A: fh.trajectory(A, iter([X])), TypeError, "points must be a list, or an object"),
    (lambda A: fh.trajectory(A, 3), TypeError, "got int"),
    (lambda A: fh.filter_normalized(A), ValueError, "two or more dimensions"),
]


@pytest.mark.parametrize("case", range(len(CALLS)))
def test_bad_input_is_refused_in_one_line(case):
    call, error, words = CALLS[case]
    with pytest.raises(error, match=words) as caught:
        call(quadratic()[0])
    assert "\n" not in str(caught.value)


def test_bad_counts_and_directions_of_filters_are_refused():
    A = network()
    for given, error, words in (
        (0, ValueError, "directions must be at least 1"), (1.5, TypeError, "must be an integer"),
        (torch.ones(3, dtype=F64), ValueError, "directions must have shape"),
        (torch.ones(A.n), TypeError, r"directions must be torch.float64"),
    ):  # fmt: skip
        with pytest.raises(error, match=words):
            fh.filter_normalized(A, given)
    with pytest.raises(ValueError, match="seed must be from 0"):
        fh.filter_normalized(A, seed=-1)
    assert module.ROWS == 8  # test_checkpoints_are_read_one_at_a_time counts by it
