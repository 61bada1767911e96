"""Assigned params and gradsH, overridden products, subclasses without super().__init__."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fasthessian as fh
from fasthessian.pyhessian import (
    group_add,
    group_product,
    hessian,
)
from tests.support.pyhessian_cases import (
    MODES,
    ByHand,
    batches,
    by_magnitude,
    cross_entropy,
    dense,
    made,
    mean_loss_hessian,
    mlp,
)


def test_each_layer_alone_and_back():
    model, data = mlp(), batches()
    h = made("data", model, data)
    params, grads = h.params, h.gradsH
    for i, p in enumerate(params):
        h.params, h.gradsH = [params[i]], [grads[i]]
        expected = by_magnitude(mean_loss_hessian(model, data, [p]))
        values, vectors = h.eigenvalues(maxIter=200, tol=1e-5, top_n=2)
        np.testing.assert_allclose(values, expected[:2], rtol=1e-3, atol=1e-6)
        assert [x.shape for x in vectors[0]] == [p.shape]
        assert len(h.density(iter=7)[0][0]) == 7
        assert np.mean(h.trace(maxIter=300, tol=0)) == pytest.approx(float(expected.sum()), rel=0.2)
    h.params, h.gradsH = params, grads
    top = by_magnitude(mean_loss_hessian(model, data))[0]
    assert h.eigenvalues(tol=1e-5)[0][0] == pytest.approx(float(top), rel=1e-4)


@pytest.mark.parametrize("order", ["params first", "gradsH first", "params only"])
@MODES
def test_order_of_assignment_does_not_matter(mode, order):
    model, data = mlp(), batches()
    h = made(mode, model, data)
    if order == "gradsH first":
        h.gradsH = [h.gradsH[2]]
    h.params = [h.params[2]]
    if order == "params first":
        h.gradsH = [h.gradsH[2]]
    top = by_magnitude(mean_loss_hessian(model, data, h.params))[0]
    assert h.eigenvalues(tol=1e-5)[0][0] == pytest.approx(float(top), rel=1e-4)


def test_lists_changed_in_place_are_honoured():
    model, data = mlp(), batches()
    h = made("data", model, data)
    grads = h.gradsH
    del h.params[1:], grads[1:]
    top = by_magnitude(mean_loss_hessian(model, data, list(model.parameters())[:1]))[0]
    assert h.eigenvalues(tol=1e-5)[0][0] == pytest.approx(float(top), rel=1e-4)


def test_gradients_of_the_users_own_loss():
    model, data = mlp(), batches()
    h = made("data", model, data)
    decay = 0.5
    loss = cross_entropy(model(data[0][0]), data[0][1])
    loss = loss + 0.5 * decay * sum((p**2).sum() for p in model.parameters())
    h.gradsH = list(torch.autograd.grad(loss, h.params, create_graph=True))
    top = by_magnitude(mean_loss_hessian(model, data))[0] + decay
    assert h.eigenvalues(tol=1e-5)[0][0] == pytest.approx(float(top), rel=1e-4)


def test_mismatched_params_and_gradients_are_named():
    h = made("data", mlp(), batches())
    h.gradsH = h.gradsH[:2]
    with pytest.raises(ValueError, match=r"gradsH 2.*together"):
        h.eigenvalues()
    h = made("data", mlp(), batches())
    h.params = [torch.ones(3, requires_grad=True)]
    with pytest.raises(ValueError, match="assign gradsH too"):
        h.eigenvalues()


def test_criterion_and_data_are_live_too():
    model, data = mlp(), batches()
    h = made("dataloader", model, data)
    h.eigenvalues()
    h.data = batches((7, 5), seed=9)
    h.criterion = nn.CrossEntropyLoss(reduction="sum")
    top = 12 * by_magnitude(mean_loss_hessian(model, h.data))[0]
    assert h.eigenvalues(tol=1e-5)[0][0] == pytest.approx(float(top), rel=1e-4)
    h.data.append(batches((4,), seed=3)[0])
    top = 16 * by_magnitude(mean_loss_hessian(model, h.data))[0]
    assert h.eigenvalues(tol=1e-5)[0][0] == pytest.approx(float(top), rel=1e-4)


@pytest.mark.filterwarnings("ignore:Using backward")
def test_an_overridden_product_serves_all_methods():
    model, data = mlp(), batches((8, 4))
    # an old .grad must not enter, with or without a graph
    cross_entropy(model(data[0][0]), data[0][1]).backward(create_graph=True)
    H = mean_loss_hessian(model, data)
    h = ByHand(model, cross_entropy, dataloader=data, cuda=False)
    values, vectors = h.eigenvalues(tol=1e-5, top_n=2)
    np.testing.assert_allclose(values, by_magnitude(H)[:2], rtol=1e-4)
    assert [x.shape for x in vectors[0]] == [p.shape for p in model.parameters()]
    assert np.mean(h.trace(maxIter=300, tol=0)) == pytest.approx(float(H.trace()), rel=0.15)
    assert max(h.density(iter=20)[0][0]) == pytest.approx(values[0], rel=1e-3)


def test_an_override_may_build_on_the_products_of_the_base():
    class Decayed(hessian):
        def dataloader_hv_product(self, v):
            _, Hv = super().dataloader_hv_product(v)
            group_add(Hv, v, alpha=0.25)
            group_add(v, v)  # v may be overwritten: it belongs to the callee
            return group_product(Hv, v).item(), Hv

    model, data = mlp(), batches((8, 4))
    h = Decayed(model, cross_entropy, dataloader=data, cuda=False)
    top = by_magnitude(mean_loss_hessian(model, data))[0] + 0.25
    assert h.eigenvalues(tol=1e-5)[0][0] == pytest.approx(float(top), rel=1e-4)


def test_an_override_set_on_the_object():
    h = made("dataloader", mlp(), batches())
    h.dataloader_hv_product = lambda v: (0.0, [3 * x for x in v])
    assert h.eigenvalues()[0] == pytest.approx([3.0])


@pytest.mark.parametrize("graph_mode", ["train", "eval"])
def test_an_init_without_super_keeps_its_own_mode(graph_mode):
    class Own(hessian):
        def __init__(self, model):
            self.model, self.full_dataset = model, True
            self.params = list(model.parameters())
            self.seen = set()

        def dataloader_hv_product(self, v):
            self.seen.add(self.model.training)
            return None, [2 * v[0], None, *v[2:]]

    model = mlp()
    model.train(graph_mode == "train")
    h = Own(model)
    assert h.eigenvalues()[0] == pytest.approx([2.0])
    assert h.seen == {graph_mode == "train"}


def test_an_init_without_super_may_bring_its_gradients():
    class Collocation(hessian):
        """A physics-informed loss: no criterion, no data."""

        def __init__(self, net, x):
            self.full_dataset = False
            self.params = list(net.parameters())
            x = x.requires_grad_()
            u = net(x)
            (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            loss = ((slope - u) ** 2).mean()
            self.gradsH = list(
                torch.autograd.grad(loss, self.params, create_graph=True, materialize_grads=True)
            )

    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1)), torch.rand(9, 1)

    def residual(call):
        points = x.detach().double().requires_grad_()
        u = call(points)
        (slope,) = torch.autograd.grad(u.sum(), points, create_graph=True)
        return ((slope - u) ** 2).mean()

    H = dense(net, residual)
    values, _ = Collocation(net, x).eigenvalues(tol=1e-5, top_n=2)
    np.testing.assert_allclose(values, by_magnitude(H)[:2], rtol=1e-3)


@pytest.mark.parametrize("training", [True, False])
def test_an_init_without_super_and_the_product_of_the_base(training):
    class Own(hessian):
        def __init__(self, model, criterion, loader):
            self.model, self.criterion, self.data = model, criterion, loader
            self.params = list(model.parameters())
            self.full_dataset = True

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).train(training)
    data = batches()
    H = fh.Hessian(model, cross_entropy, data, mode="train" if training else "eval")
    expected = fh.eigsh(H, tol=1e-6).values.tolist()
    values, _ = Own(model, cross_entropy, data).eigenvalues(tol=1e-6)
    assert values == pytest.approx(expected, rel=1e-4)


def test_gradients_may_be_missing_for_some_parameters():
    model, data = mlp(), batches()
    h = made("data", model, data)
    head = list(model.parameters())[2:]
    loss = cross_entropy(model(data[0][0]), data[0][1])
    grads = torch.autograd.grad(loss, head, create_graph=True)
    h.gradsH = [None, None, *grads]
    h.params = [*(p.detach().requires_grad_() for p in h.params[:2]), *head]
    top = by_magnitude(mean_loss_hessian(model, data, head))[0]
    assert h.eigenvalues(tol=1e-5)[0][0] == pytest.approx(float(top), rel=1e-4)


def test_an_override_that_returns_too_few_tensors():
    h = made("dataloader", mlp(), batches())
    h.dataloader_hv_product = lambda v: (0.0, v[:1])
    with pytest.raises(ValueError, match="one tensor for each parameter"):
        h.eigenvalues()
