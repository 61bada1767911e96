"""The user's model, gradients, modes and random states stay as they were, whatever happens."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import fasthessian as fh
from tests.support.models import ENGINES, PROBLEMS
from tests.support.untouched import restless, world

each_engine = pytest.mark.parametrize("engine", ENGINES)


@each_engine
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("loader", [False, True])
def test_nothing_of_the_user_changes(loader: bool, mode: str, engine: str) -> None:
    model, criterion, x, y = restless()
    data: Any = [(x[:4], y[:4]), (x[4:], y[4:])]
    if loader:
        data = DataLoader(TensorDataset(x, y), 3, shuffle=mode == "eval")
    before = world(model, criterion)
    A = fh.Hessian(model, criterion, data, mode=mode, engine=engine)
    assert world(model, criterion) == before
    first = A @ torch.eye(A.n)[:3]
    assert world(model, criterion) == before
    second = A @ torch.eye(A.n)[:3]
    if loader and mode == "eval":  # the order of the samples differs
        assert (first - second).norm() > 0 or engine == "retained"
    else:
        assert torch.equal(first, second)
    A.gradient(), A.loss(), A.loss(torch.ones(A.n))
    assert world(model, criterion) == before


@each_engine
def test_nothing_changes_after_an_exception(engine: str) -> None:
    model, criterion, x, y = restless()
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    before = world(model, criterion)
    A = fh.Hessian(model, criterion, batches, engine=engine)
    expected = A @ torch.ones(A.n)
    model.first.weight.data.mul_(1.0)  # the same bits
    model.fail = True
    for failing in (lambda: A.loss(torch.ones(A.n)), A.gradient,
                    lambda: fh.Hessian(model, criterion, batches, engine=engine)):  # fmt: skip
        with pytest.raises(KeyError, match="from inside the model"):
            failing()
        assert world(model, criterion) == before
    model.fail = False
    batches[1][0][0, 0] = float("nan")
    for call in (lambda: A @ torch.ones(A.n), A.gradient):
        with pytest.raises(ValueError, match="the loss is nan"):
            call()
        assert world(model, criterion) == before
    batches[1][0][0, 0] = 1.0
    x[4, 0] = 1.0
    fresh = fh.Hessian(model, criterion, batches, engine=engine) @ torch.ones(A.n)
    assert torch.equal(A @ torch.ones(A.n), fresh) and not torch.equal(fresh, expected)
    assert world(model, criterion) == before


def test_gradients_in_grad_do_not_enter_products() -> None:
    model, criterion, data = PROBLEMS["mlp"].make()
    A = fh.Hessian(model, criterion, data)
    Hv = A @ torch.ones(A.n, dtype=A.dtype)
    criterion(model(data[0]), data[1]).backward()
    assert torch.equal(A @ torch.ones(A.n, dtype=A.dtype), Hv)
    B = fh.Hessian(model, criterion, data)
    assert torch.equal(B @ torch.ones(A.n, dtype=A.dtype), Hv)


def test_a_modules_own_train_method_is_not_called() -> None:
    model, criterion, data = PROBLEMS["mlp"].make()

    class Merging(nn.Sequential):
        def train(self, mode: bool = True) -> Merging:
            raise AssertionError("train() was called")

    A = fh.Hessian(Merging(*model), criterion, data)
    assert (A @ torch.ones(A.n, dtype=A.dtype)).isfinite().all()


def test_a_closure_keeps_the_random_states_and_sees_the_same_numbers() -> None:
    w = torch.ones(3, requires_grad=True)

    def closure() -> Tensor:
        return (w.pow(3) * torch.rand(3)).sum() * np.random.rand() * random.random()

    torch.manual_seed(11)
    np.random.seed(11)
    random.seed(11)
    kept = fh.Hessian.from_closure(closure, [w], engine="retained")
    rebuilt = fh.Hessian.from_closure(closure, [w], engine="recompute")
    v = torch.ones(3)
    Hv = [kept @ v, rebuilt @ v, rebuilt @ v]
    assert torch.equal(Hv[0], Hv[1]) and torch.equal(Hv[1], Hv[2])
    drawn = torch.rand(1).item(), np.random.rand(), random.random()
    torch.manual_seed(11)
    np.random.seed(11)
    random.seed(11)
    assert drawn == (torch.rand(1).item(), np.random.rand(), random.random())


class DrawsInBackward(torch.autograd.Function):
    """The square, whose backward passes draw random numbers."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return DrawsInBackward.apply(ctx.saved_tensors[0]) * 0 + (
            2 * grad * ctx.saved_tensors[0] * (1 + 0 * torch.rand(()))
        )


@each_engine
def test_random_numbers_drawn_in_backward_do_not_change_the_random_states(engine: str) -> None:
    w = torch.ones(3, requires_grad=True)
    state = torch.get_rng_state()
    A = fh.Hessian.from_closure(lambda: DrawsInBackward.apply(w).sum(), [w], engine=engine)
    assert (A @ torch.ones(3)).tolist() == [2.0, 2.0, 2.0]
    assert torch.equal(torch.get_rng_state(), state)


@each_engine
def test_checkpointed_layers_are_run_again_in_the_same_mode(engine: str) -> None:
    class Checkpointed(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.inner, x, use_reentrant=False)

    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.4), nn.Linear(8, 3))
    criterion, x, y = nn.CrossEntropyLoss(), torch.randn(9, 4), torch.randint(3, (9,))
    v = torch.ones(sum(p.numel() for p in inner.parameters()))
    for mode in ("eval", "train"):
        expected = fh.Hessian(inner, criterion, (x, y), mode=mode) @ v
        A = fh.Hessian(Checkpointed(inner), criterion, (x, y), mode=mode, engine=engine)
        before = world(inner, criterion)
        assert torch.equal(A @ v, expected)
        assert world(inner, criterion) == before
