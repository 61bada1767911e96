"""Hessian products equal the dense Hessian at the current parameters of the model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fasthessian as fh
from fasthessian import kernels
from tests.support.models import ENGINES, PROBLEMS, columns, error

each_problem = pytest.mark.parametrize("name", PROBLEMS)
each_engine = pytest.mark.parametrize("engine", ENGINES)


@each_engine
@each_problem
def test_products_equal_the_dense_hessian_in_float64(name: str, engine: str) -> None:
    made = PROBLEMS[name].make()
    A = PROBLEMS[name].operator(*made, engine=engine)
    exact = PROBLEMS[name].dense(*made)
    H = columns(A)
    assert error(H, exact) < 1e-10
    assert torch.equal(H[3], A @ torch.eye(A.n, dtype=A.dtype)[3])
    assert A.engine.startswith(engine)


@each_engine
@each_problem
def test_products_in_float32_stay_within_the_error_budget(name: str, engine: str) -> None:
    problem = PROBLEMS[name]
    exact = problem.dense(*problem.make())
    made = problem.make(torch.float32)
    budget = 2 * error(problem.dense(*made), exact) + 4 * torch.finfo(torch.float32).eps
    assert error(columns(problem.operator(*made, engine=engine)), exact) <= budget


@pytest.mark.parametrize("name", ["transformer", "cnn"])
def test_products_equal_central_differences_of_gradients(name: str) -> None:
    model, criterion, (x, y) = PROBLEMS[name].make()
    A = fh.Hessian(model, criterion, (x, y))
    v = kernels.reference.normal_(torch.empty(A.n, dtype=A.dtype), 3)
    model.eval()
    params, ends = list(model.parameters()), []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            for p, d in zip(params, A.layout.views(v), strict=True):
                p.add_(d, alpha=step)
        ends.append(A.flatten(torch.autograd.grad(criterion(model(x), y), params)))
        with torch.no_grad():
            for p, d in zip(params, A.layout.views(v), strict=True):
                p.sub_(d, alpha=step)
    Hv = A @ v
    assert (Hv - (ends[0] - ends[1]) / 2e-5).norm() < 1e-7 * Hv.norm()


def test_logistic_regression_has_its_closed_form() -> None:
    model, criterion, (x, y) = PROBLEMS["logistic"].make()
    p = torch.sigmoid(model(x)).detach()
    exact = x.T @ (p * (1 - p) * x) / len(x)
    assert error(columns(fh.Hessian(model, criterion, (x, y))), exact) < 1e-14


@each_problem
def test_gradient_and_loss_equal_plain_torch(name: str) -> None:
    problem = PROBLEMS[name]
    model, criterion, data = problem.make()
    A = problem.operator(model, criterion, data)
    model.eval()
    loss = criterion(model) if data is None else criterion(model(data[0]), data[1])
    gradient = A.flatten(torch.autograd.grad(loss, list(model.parameters())))
    assert math.isclose(A.loss(), float(loss.detach()), rel_tol=1e-13)
    assert (A.gradient() - gradient).norm() <= 1e-13 * gradient.norm()


@each_engine
def test_loss_at_an_offset_leaves_parameters_and_graphs_unchanged(engine: str) -> None:
    model, criterion, (x, y) = PROBLEMS["cnn"].make(torch.float32)
    A = fh.Hessian(model, criterion, (x, y), engine=engine)
    v = kernels.reference.normal_(torch.empty(A.n), 1)
    Hv = A @ v
    before = [(p.data_ptr(), p._version, p.detach().clone()) for p in model.parameters()]
    moved = PROBLEMS["cnn"].make(torch.float32)[0].eval()
    with torch.no_grad():
        for p, d in zip(moved.parameters(), A.layout.views(v), strict=True):
            p.add_(d)
    assert A.loss(v) == pytest.approx(float(criterion(moved(x), y).detach()), rel=1e-6)
    assert A.loss(v) != A.loss()
    for p, (address, version, value) in zip(model.parameters(), before, strict=True):
        assert (p.data_ptr(), p._version) == (address, version)
        assert torch.equal(p, value)
    assert torch.equal(A @ v, Hv)
    assert math.isnan(A.loss(torch.full_like(v, math.nan)))
    assert torch.equal(A @ v, Hv)


@each_engine
def test_double_backward_is_exact_for_tied_unused_frozen_and_linear_parameters(engine: str) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight
            self.frozen = nn.Linear(3, 3).requires_grad_(False)
            self.unused = nn.Parameter(torch.ones(2))
            self.linear = nn.Parameter(torch.ones(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.frozen(torch.tanh(self.first(x)))))

    torch.manual_seed(0)
    model, x, y = Odd().double(), torch.randn(5, 3).double(), torch.randn(5, 3).double()

    def loss(w: Tensor, b: Tensor, c: Tensor) -> Tensor:
        h = torch.tanh(model.frozen(torch.tanh(F.linear(x, w, b))))
        return F.mse_loss(F.linear(h, w, c), y)

    used = (model.first.weight, model.first.bias, model.second.bias)
    blocks = torch.autograd.functional.hessian(loss, used)
    exact = torch.cat(
        [
            torch.cat([block.reshape(p.numel(), -1) for block in row], dim=1)
            for p, row in zip(used, blocks, strict=True)
        ]
    )
    A = fh.Hessian(model, lambda out, t: F.mse_loss(out, t) + model.linear.sum(), (x, y),
                   engine=engine)  # fmt: skip
    H = A.unflatten
    names = ("first.weight", "first.bias", "second.bias")
    assert set(A.layout.names) == {*names, "unused", "linear"}
    for v in torch.eye(A.n, dtype=A.dtype):
        image, source = H(A @ v), H(v)
        vector = torch.cat([source[name].flatten() for name in names])
        assert torch.allclose(torch.cat([image[n].flatten() for n in names]), exact @ vector,
                              atol=1e-12)  # fmt: skip
        assert not image["unused"].any() and not image["linear"].any()


@each_engine
def test_a_loss_linear_in_all_parameters_has_zero_products(engine: str) -> None:
    w = torch.ones(3, requires_grad=True)
    A = fh.Hessian.from_closure(lambda: 2 * w.sum(), [w], engine=engine)
    assert not columns(A).any()
    assert torch.equal(A.gradient(), torch.full((3,), 2.0))


@each_engine
def test_parameters_that_share_one_gradient_tensor_are_kept_apart(engine: str) -> None:
    a, b = torch.ones(2, requires_grad=True), torch.full((2,), 2.0, requires_grad=True)
    A = fh.Hessian.from_closure(lambda: (a + b).pow(3).sum(), {"a": a, "b": b}, engine=engine)
    block = 18 * torch.eye(2)
    assert torch.equal(columns(A), torch.cat([torch.cat([block, block])] * 2, 1))


def test_params_choose_a_diagonal_block_by_name_or_tensor() -> None:
    model, criterion, data = PROBLEMS["mlp"].make()
    whole = PROBLEMS["mlp"].dense(model, criterion, data)
    sizes = [p.numel() for p in model.parameters()]
    last = slice(sizes[0] + sizes[1], None)
    for params in (["2.weight", "2.bias"], model[2].parameters(), list(model[2].parameters())):
        A = fh.Hessian(model, criterion, data, params=params)
        assert A.layout.names == ("2.weight", "2.bias")
        assert error(columns(A), whole[last, last]) < 1e-12
    tied, criterion, data = PROBLEMS["transformer"].make()
    A = fh.Hessian(tied, criterion, data, params=["head.weight"])  # the second name of embed.weight
    assert A.layout.names == ("embed.weight",)


@each_engine
def test_train_mode_uses_batch_statistics_and_one_dropout_mask(engine: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).double()
    x, y = torch.randn(9, 4).double(), torch.randint(2, (9,))
    A = fh.Hessian(model, nn.CrossEntropyLoss(), (x, y), mode="train", engine=engine)
    params = dict(model.named_parameters())

    def loss(*values: Tensor) -> Tensor:
        w1, b1, g, b, w2, b2 = values
        h = F.batch_norm(F.linear(x, w1, b1), None, None, g, b, training=True)
        return F.cross_entropy(F.linear(torch.tanh(h), w2, b2), y)

    v = kernels.reference.normal_(torch.empty(A.n, dtype=A.dtype), 0)
    pieces = tuple(A.layout.views(v))
    exact = torch.autograd.functional.hvp(loss, tuple(params.values()), pieces)[1]
    assert (A @ v - A.flatten(exact)).norm() < 1e-12 * v.norm()

    dropping = nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Dropout(0.5), nn.Linear(30, 2))
    data = [(x.float()[:5], y[:5]), (x.float()[5:], y[5:])]
    B = fh.Hessian(dropping, nn.CrossEntropyLoss(), data, mode="train", engine=engine)
    H = columns(B)
    assert torch.equal(columns(B), H) and error(H, H.T.double()) < 1e-5
    evaluated = columns(fh.Hessian(dropping, nn.CrossEntropyLoss(), data, engine=engine))
    assert error(H, evaluated.double()) > 0.1


def _step(model: nn.Module) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(model.parameters(), 0.1).step()


def _without_autograd(model: nn.Module) -> None:
    for p in model.parameters():
        p.data.add_(0.1)


def _replaced(model: nn.Module) -> None:
    model.head.weight = nn.Parameter(model.head.weight.detach() * 2.0)


def _statistics(model: nn.Module) -> None:
    model.norm1.running_var.mul_(2.0)


def _statistics_replaced(model: nn.Module) -> None:
    model.norm1.running_mean = model.norm1.running_mean + 0.5


def _frozen(model: nn.Module) -> None:
    with torch.no_grad():
        model.conv1.weight.add_(0.1)


def _loaded(model: nn.Module) -> None:
    state = {k: t + 0.1 if t.is_floating_point() else t for k, t in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.conv1.weight.requires_grad_(False)


@each_engine
@pytest.mark.parametrize("change", [_step, _without_autograd, _replaced, _statistics, _frozen,
                                    _statistics_replaced, _loaded])  # fmt: skip
def test_products_use_the_changed_model(change: Any, engine: str) -> None:
    model, criterion, data = PROBLEMS["cnn"].make()
    model.conv1.weight.requires_grad_(False)
    A = fh.Hessian(model, criterion, data, engine=engine)
    before = columns(A)
    change(model)
    exact = PROBLEMS["cnn"].dense(model, criterion, data)
    assert error(before, exact) > 1e-4
    assert error(columns(A), exact) < 1e-10
    assert error(columns(A), exact) < 1e-10


@each_engine
def test_products_of_a_closure_use_its_changed_parameters(engine: str) -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    A = fh.Hessian.from_closure(lambda: w.pow(4).sum(), [w], engine=engine)
    assert torch.equal(A @ torch.ones(2), torch.tensor([12.0, 48.0]))
    w.data.mul_(2.0)
    assert torch.equal(A @ torch.ones(2), torch.tensor([48.0, 192.0]))


@each_engine
def test_products_are_right_after_writes_that_change_no_value(engine: str) -> None:
    model, criterion, data = PROBLEMS["cnn"].make()
    A = fh.Hessian(model, criterion, data, engine=engine)
    H = columns(A)
    for written in (model.parameters(), model.buffers(), data[:1]):
        with torch.no_grad():
            for t in written:
                t.mul_(1)  # autograd rejects graphs whose tensors were written
        assert torch.equal(columns(A), H)


def test_parameters_of_another_shape_or_dtype_need_a_new_operator() -> None:
    model, criterion, data = PROBLEMS["mlp"].make()
    A = fh.Hessian(model, criterion, data)
    model.float()
    with pytest.raises(RuntimeError, match="build a new Hessian"):
        A @ torch.ones(A.n, dtype=torch.float64)
    model.double()[2] = nn.Linear(6, 4).double()
    with pytest.raises(RuntimeError, match="build a new Hessian"):
        A @ torch.ones(A.n, dtype=torch.float64)
    model[2] = nn.Identity()
    with pytest.raises(RuntimeError, match="left the model"):
        A.loss()
