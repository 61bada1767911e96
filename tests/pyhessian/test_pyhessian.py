"""The drop-in's class: arguments, return types, seeds, and the state that it does not change."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import fasthessian as fh
from fasthessian.pyhessian import (
    hessian,
)
from tests.support.pyhessian_cases import (
    MODES,
    ByHand,
    Quadratic,
    batches,
    by_magnitude,
    cross_entropy,
    made,
    mean_loss_hessian,
    mlp,
    output,
    quadratic,
    quadratic_data,
    symmetric,
)


@MODES
def test_eigenvalues_are_the_largest_in_magnitude_with_unit_vectors(mode):
    model, data = mlp(), batches()
    H = mean_loss_hessian(model, data)
    values, vectors = made(mode, model, data).eigenvalues(maxIter=200, tol=1e-5, top_n=4)
    assert all(isinstance(x, float) for x in values) and len(values) == 4
    np.testing.assert_allclose(values, by_magnitude(H)[:4], rtol=1e-4)
    for value, vector in zip(values, vectors, strict=True):
        assert [x.shape for x in vector] == [p.shape for p in model.parameters()]
        flat = torch.cat([x.flatten() for x in vector]).double()
        assert abs(float(flat.norm()) - 1) < 1e-5
        assert float((H @ flat - value * flat).norm()) < 1e-4 * values[0]


@MODES
def test_trace_returns_the_samples(mode):
    model, data = mlp(), batches((6, 6) if mode == "dataloader" else (12,))
    samples = made(mode, model, data).trace(maxIter=4000, tol=0.05)
    exact = float(mean_loss_hessian(model, data).trace())
    assert all(isinstance(x, float) for x in samples)
    assert np.mean(samples) == pytest.approx(exact, rel=0.1)


@MODES
def test_density_returns_nodes_and_weights_of_each_run(mode):
    model, data = mlp(), batches()
    H = mean_loss_hessian(model, data)
    nodes, weights = made(mode, model, data).density(iter=12, n_v=3)
    assert [len(row) for row in nodes] == [len(row) for row in weights] == [12] * 3
    assert all(isinstance(x, float) for row in (*nodes, *weights) for x in row)
    np.testing.assert_allclose(np.sum(weights, axis=1), 1.0, atol=1e-6)
    # each run's second moment estimates tr(H^2)/n
    moment = np.mean(np.sum(np.array(weights) * np.array(nodes) ** 2, axis=1))
    assert moment == pytest.approx(float((H**2).sum()) / len(H), rel=0.5)
    assert nodes[0] != nodes[1]


def test_runs_start_from_random_signs():
    # for a diagonal H every start of signs has the same weights 1/n; a normal start has not
    A = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    h = hessian(Quadratic(A), output, data=quadratic_data(), cuda=False)
    _, weights = h.density(iter=4, n_v=2)
    np.testing.assert_allclose(weights, 0.25, atol=1e-5)
    np.testing.assert_allclose(h.trace(maxIter=20), 10.0, rtol=1e-5)


def test_attributes():
    model, ((x, y),) = mlp(), batches()
    one = hessian(model, cross_entropy, data=(x, y), cuda=False)
    assert (one.model, one.criterion, one.device) == (model, cross_entropy, "cpu")
    assert one.full_dataset is False
    assert one.inputs is x
    assert one.targets is y
    assert one.data == (x, y)
    assert all(a is b for a, b in zip(one.params, model.parameters(), strict=True))
    assert [g.shape for g in one.gradsH] == [p.shape for p in one.params]
    loader = [(x, y)]
    full = hessian(model, cross_entropy, None, loader, False)
    assert full.full_dataset is True
    assert full.data is loader
    for a, b in zip(one.gradsH, full.gradsH, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("given", [{}, {"data": 1, "dataloader": 2}])
def test_exactly_one_of_data_and_dataloader(given):
    with pytest.raises(ValueError, match="exactly one of data and dataloader") as caught:
        hessian(mlp(), cross_entropy, cuda=False, **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda h: h.eigenvalues(maxIter=0), "maxIter"),
        (lambda h: h.eigenvalues(top_n=0), "top_n"),
        (lambda h: h.eigenvalues(tol=float("nan")), "tol"),
        (lambda h: h.trace(maxIter=-1), "maxIter"),
        (lambda h: h.density(iter=0), "iter"),
        (lambda h: h.density(n_v=0), "n_v"),
        (lambda h: h.dataloader_hv_product([torch.ones(2)]), "shape"),
    ],
)
def test_bad_arguments_are_named(call, name):
    with pytest.raises(ValueError, match=name) as caught:
        call(quadratic([1.0, 2.0, 3.0]))
    assert "\n" not in str(caught.value)


def test_data_of_no_known_form_and_models_without_parameters():
    with pytest.raises(TypeError, match="data must be one batch"):
        hessian(mlp(), cross_entropy, data=torch.ones(3), cuda=False)
    with pytest.raises(ValueError, match="no trainable parameters"):
        hessian(nn.Identity(), cross_entropy, data=batches()[0], cuda=False)


def test_a_loader_hands_out_lists_and_data_may_be_one():
    model, data = mlp(), batches()
    h = hessian(model, cross_entropy, data=list(data[0]), cuda=False)
    top = by_magnitude(mean_loss_hessian(model, data))[0]
    assert h.eigenvalues(tol=1e-5)[0][0] == pytest.approx(float(top), rel=1e-4)
    pairs = tuple(batches((6, 6)))
    h = hessian(model, cross_entropy, dataloader=pairs, cuda=False)
    top = by_magnitude(mean_loss_hessian(model, list(pairs)))[0]
    assert h.eigenvalues(tol=1e-5)[0][0] == pytest.approx(float(top), rel=1e-4)


def test_more_eigenvalues_than_parameters_gives_all():
    values, vectors = quadratic([3.0, 2.0, 2.0, -1.0, 0.0]).eigenvalues(top_n=50)
    assert values == pytest.approx([3.0, 2.0, 2.0, -1.0, 0.0], abs=1e-4)
    assert len(vectors) == 5


def test_a_hessian_of_zeros():
    h = quadratic([0.0, 0.0, 0.0])
    assert h.eigenvalues(top_n=2)[0] == [0.0, 0.0]
    nodes, weights = h.density(iter=4)
    assert nodes == [[0.0] * 4]
    assert sum(weights[0]) == 1.0


@pytest.mark.parametrize(("maxIter", "top_n"), [(1, 1), (3, 4), (100, 3)])
def test_maxIter_bounds_the_products_of_each_eigenvalue(maxIter, top_n):
    class Counting(hessian):
        calls = 0

        def dataloader_hv_product(self, v):
            self.calls += 1
            return super().dataloader_hv_product(v)

    model = Quadratic(symmetric(np.linspace(-1, 2, 60)))
    h = Counting(model, output, dataloader=[quadratic_data()], cuda=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fh.ConvergenceWarning)
        assert len(h.eigenvalues(maxIter=maxIter, top_n=top_n)[0]) == top_n
    assert 1 <= h.calls <= maxIter * top_n


def test_warnings_name_the_arguments_of_the_call():
    h = quadratic(np.linspace(-1, 2, 60))
    with pytest.warns(fh.ConvergenceWarning, match=r"eigenvalues.*maxIter"):
        h.eigenvalues(maxIter=2, tol=1e-6)
    with pytest.warns(fh.ConvergenceWarning, match=r"trace.*maxIter"):
        h.trace(maxIter=20)


def test_tolerance_zero_uses_all_iterations_without_complaint():
    h = quadratic(np.linspace(-1, 2, 60))
    assert len(h.trace(maxIter=37, tol=0)) == 37
    assert h.eigenvalues(maxIter=200, tol=0)[0] == pytest.approx([2.0], abs=1e-5)
    assert len(h.trace(maxIter=1, tol=0)) == 1


def test_numpy_integers_are_counts():
    h = quadratic(np.linspace(-1, 2, 10))
    assert len(h.eigenvalues(np.int64(100), 1e-3, np.int64(2))[0]) == 2


def test_seeds_follow_torch_and_calls_differ():
    h = quadratic(np.linspace(-1, 2, 60))
    first, second = h.trace(maxIter=20, tol=0), h.trace(maxIter=20, tol=0)
    assert first != second
    results = []
    for _ in range(2):
        torch.manual_seed(7)
        fresh = hessian(h.model, output, data=quadratic_data(), cuda=False)
        results.append((fresh.trace(maxIter=20, tol=0), fresh.density(iter=5), fresh.eigenvalues()))
    assert results[0][:2] == results[1][:2]
    assert results[0][2][0] == results[1][2][0]
    torch.manual_seed(8)
    other = hessian(h.model, output, data=quadratic_data(), cuda=False)
    assert other.trace(maxIter=20, tol=0) != results[0][0]


@pytest.mark.filterwarnings("ignore:Using backward")
@pytest.mark.parametrize("mode", ["data", "dataloader", "layer", "override", "raises"])
def test_the_state_of_the_user_does_not_change(mode):
    """As after PyHessian: eval mode, no .grad, a new random state, the same values."""
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 3))
    data = batches()
    cross_entropy(model(data[0][0]), data[0][1]).backward()
    model.train()

    class Rude(ByHand):
        def dataloader_hv_product(self, v):
            self.model.train()
            torch.rand(3)
            result = super().dataloader_hv_product(v)
            if mode == "raises":
                raise RuntimeError("no")
            return result

    def state():
        return [p.clone() for p in model.parameters()], [b.clone() for b in model.buffers()]

    before = state()
    if mode in ("override", "raises"):
        h = Rude(model, cross_entropy, dataloader=data, cuda=False)
    else:
        h = made("data" if mode == "layer" else mode, model, data)
    assert not any(module.training for module in model.modules())
    random_state = torch.get_rng_state()
    if mode == "layer":
        h.params, h.gradsH = h.params[:1], h.gradsH[:1]
    if mode == "raises":
        with pytest.raises(RuntimeError, match="no"):
            h.eigenvalues()
    else:
        h.eigenvalues(tol=0.1)
        h.trace(maxIter=5, tol=0)
        h.density(iter=5)
        assert len(h.gradsH)
    torch.testing.assert_close(before, state(), rtol=0, atol=0)
    assert not any(module.training for module in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert not torch.equal(torch.get_rng_state(), random_state)
