"""What the drop-in's constructor leaves in .grad, and what clears it."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

import fasthessian as fh
from fasthessian.pyhessian import get_params_grad, group_add, hessian, hessian_vector_product
from tests.support.pyhessian_cases import (
    Marked,
    MarkedModel,
    Partly,
    assert_top,
    batches,
    by_magnitude,
    cross_entropy,
    mean_loss_hessian,
    mean_output,
    mlp,
)

pytestmark = pytest.mark.filterwarnings("ignore::fasthessian.ConvergenceWarning")


def flat(tensors):
    return torch.cat([x.detach().reshape(-1) for x in tensors]).double()


def right(model, data):
    loss = cross_entropy(model(data[0]), data[1])
    return flat(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("stale", ["none", "values", "an earlier object"])
def test_the_constructor_sets_the_gradients_and_adds_to_none(stale):
    model, (data,) = mlp(), batches()
    if stale == "values":
        cross_entropy(model(data[0]), data[1]).backward()
    elif stale == "an earlier object":
        hessian(model, cross_entropy, data=data, cuda=False)
    h = hessian(model, cross_entropy, data=data, cuda=False)
    torch.testing.assert_close(flat(p.grad for p in model.parameters()), right(model, data))
    torch.testing.assert_close(flat(h.gradsH), right(model, data))
    assert_top(h, mean_loss_hessian(model, [data]))


@pytest.mark.parametrize("around", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_gradients_can_be_differentiated(around):
    model, (data,) = mlp(), batches()
    with around():
        hessian(model, cross_entropy, data=data, cuda=False)
    params, grads = get_params_grad(model)
    Hv = torch.autograd.grad(grads, params, [torch.ones_like(p) for p in params])
    H = mean_loss_hessian(model, [data])
    torch.testing.assert_close(flat(Hv), H.sum(1), rtol=1e-3, atol=1e-5)


def test_unused_parameters_have_no_gradient_and_linear_ones_have_one_without_graph():
    torch.manual_seed(0)
    model, (data,) = Partly(), batches()
    cross_entropy(model.unused(data[0]), data[1]).backward()  # stale, and not of this loss
    hessian(model, mean_output, data=data, cuda=False)
    assert model.unused.weight.grad is None
    assert not model.shift.grad.requires_grad
    assert model.used.weight.grad.requires_grad
    _, grads = get_params_grad(model)
    assert [g.shape for g in grads] == [p.shape for p in model.parameters()]
    assert not grads[3].any()


def test_frozen_parameters_keep_their_gradient():
    model, (data,) = mlp(), batches()
    cross_entropy(model(data[0]), data[1]).backward()
    kept = model[0].weight.grad
    model[0].weight.requires_grad_(False)
    hessian(model, cross_entropy, data=data, cuda=False)
    assert model[0].weight.grad is kept


def test_gradients_set_to_zero_by_an_optimiser_leave_gradsH():
    model, (data,) = mlp(), batches()
    h = hessian(model, cross_entropy, data=data, cuda=False)
    torch.optim.SGD(model.parameters(), lr=1.0).zero_grad(set_to_none=False)
    torch.testing.assert_close(flat(h.gradsH), right(model, data))


METHODS = {
    "eigenvalues": lambda h: h.eigenvalues(tol=0.1),
    "trace": lambda h: h.trace(maxIter=3, tol=0),
    "density": lambda h: h.density(iter=3),
    "product": lambda h: h.dataloader_hv_product([torch.ones_like(p) for p in h.params]),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mode", ["data", "dataloader"])
def test_methods_drop_the_gradients_and_a_loader_adds_none(mode, method):
    model, data = mlp(), batches()
    cross_entropy(model(data[0][0]), data[0][1]).backward()
    stale = [p.grad for p in model.parameters()]
    h = hessian(model, cross_entropy, cuda=False, **{mode: data[0] if mode == "data" else data})
    if mode == "dataloader":
        assert all(p.grad is g for p, g in zip(model.parameters(), stale, strict=True))
    METHODS[method](h)
    assert all(p.grad is None for p in model.parameters())


def alive():
    return sum(token() is not None for token in Marked.tokens)


@pytest.mark.parametrize("last", ["model.zero_grad", "optimizer.zero_grad", "next object"])
def test_a_graph_that_only_grad_holds_dies_with_it(last):
    model, (data,) = MarkedModel(), batches()
    Marked.tokens.clear()
    gc.collect()
    gc.disable()
    try:
        h = hessian(model, cross_entropy, data=data, cuda=False)
        assert len(h.gradsH) == 4
        assert alive() == 1
        del h
        assert alive() == 1  # .grad can be differentiated as long as it is there
        if last == "next object":
            h = hessian(model, cross_entropy, data=data, cuda=False)
            assert alive() == 1
            del h
            model.zero_grad()
        elif last == "model.zero_grad":
            model.zero_grad()
        else:
            torch.optim.SGD(model.parameters(), lr=1.0).zero_grad()
        assert alive() == 0
    finally:
        gc.enable()


@pytest.mark.parametrize("asked", [False, True])
def test_the_graph_of_the_constructor_is_shared_and_freed_for_the_operator(asked):
    model, (data,) = MarkedModel(), batches()
    Marked.tokens.clear()
    h = hessian(model, cross_entropy, data=data, cuda=False)
    made = len(Marked.tokens)
    if asked:
        held = h.gradsH
        assert len(Marked.tokens) == made  # no second evaluation
        assert held[0].requires_grad
    h.eigenvalues(tol=0.1)
    gc.collect()
    assert alive() == 1 + asked


def test_a_list_of_gradients_that_the_caller_has_stays_live():
    model, (data,) = mlp(), batches()
    h = hessian(model, cross_entropy, data=data, cuda=False)
    held = h.gradsH
    h.eigenvalues()
    held[:] = [3 * g for g in held]
    top = 3 * by_magnitude(mean_loss_hessian(model, [data]))[0]
    assert h.eigenvalues(tol=1e-5)[0][0] == pytest.approx(float(top), rel=1e-4)


def test_gradients_follow_the_parameters_in_gradsH():
    model, (data,) = mlp(), batches()
    h = hessian(model, cross_entropy, data=data, cuda=False)
    group_add(h.params, [torch.ones_like(p) for p in h.params], alpha=0.1)
    torch.testing.assert_close(flat(h.gradsH), right(model, data))


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].exp()


class OnceModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, x):
        return Once.apply(0.1 * self.net(x))


def test_a_loss_without_second_derivatives_has_gradients_and_the_advice_of_its_error_works():
    model, (data,) = OnceModel().double(), batches()
    data = data[0].double(), data[1]
    h = hessian(model, cross_entropy, data=data, cuda=False)
    torch.testing.assert_close(flat(p.grad for p in model.parameters()), right(model, data))
    for needs in (lambda: h.gradsH, h.eigenvalues):
        with pytest.raises(RuntimeError, match=r"engine='difference'.*of fasthessian\.Hessian"):
            needs()
    A = fh.Hessian(model, cross_entropy, data, engine="difference")
    model.forward = lambda x: (0.1 * model.net(x)).exp()
    expected = by_magnitude(mean_loss_hessian(model, [data]))[0]
    assert fh.eigsh(A).values.item() == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("culprit", ["model", "criterion"])
@pytest.mark.parametrize("kind", [KeyError, ValueError, RuntimeError, TypeError])
def test_errors_of_the_users_code_are_not_changed(kind, culprit):
    def fail(*_):
        raise kind("mode= is mine")

    model, (data,) = mlp(), batches()
    if culprit == "model":
        model.forward = fail
    with pytest.raises(kind) as caught:
        hessian(model, fail if culprit == "criterion" else cross_entropy, data=data, cuda=False)
    assert type(caught.value) is kind
    assert caught.value.args == ("mode= is mine",)


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])
def test_errors_of_an_override_are_not_changed(kind):
    def fail(v):
        raise kind("mode= is mine")

    h = hessian(mlp(), cross_entropy, dataloader=batches(), cuda=False)
    h.dataloader_hv_product = fail
    with pytest.raises(kind) as caught:
        h.eigenvalues()
    assert caught.value.args == ("mode= is mine",)


def test_single_tensors_generators_and_missing_gradients_in_products():
    model, (data,) = mlp(), batches()
    h = hessian(model, cross_entropy, data=data, cuda=False)
    p, grad = h.params[0], h.gradsH[0]
    v = torch.randn_like(p)
    H = mean_loss_hessian(model, [data], [p])
    for args in (
        (grad, p, [v]),
        (grad, p, v),
        ((grad,), (p,), (v,)),
        ((g for g in [grad]), (q for q in [p]), (x for x in [v])),
        ([grad, 0.0, None], [p], [v, v, v]),
    ):
        (Hv,) = hessian_vector_product(*args)
        assert Hv.shape == p.shape
        torch.testing.assert_close(
            Hv.flatten().double(), H @ v.flatten().double(), rtol=1e-3, atol=1e-5
        )
    both = hessian_vector_product(grad, h.params[:2], v)  # a column of the blocks
    assert [x.shape for x in both] == [q.shape for q in h.params[:2]]
