"""What a closure changes when it is called: statistics of modules, gradients, its own tensors."""

from __future__ import annotations

import threading
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fasthessian as fh
from tests.support.interrupts import left_changed, of_modules, switches

F64 = torch.float64
each_engine = pytest.mark.parametrize("engine", ["retained", "recompute", "difference"])


def normed() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(0)
    layers = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2)
    return nn.Sequential(*layers).double().train(), *torch.randn(2, 6, 3, dtype=F64)


def hessian(loss: Any, params: list[Tensor]) -> Tensor:
    """The dense Hessian, by torch's own double backward."""
    sizes = [p.numel() for p in params]

    def of(flat: Tensor) -> Tensor:
        pieces = [x.view_as(p) for x, p in zip(flat.split(sizes), params, strict=True)]
        return loss(pieces)

    flat = torch.cat([p.detach().reshape(-1) for p in params])
    return torch.autograd.functional.hessian(of, flat)


@each_engine
def test_batch_norm_in_train_mode_keeps_its_statistics(engine: str) -> None:
    model, x, y = normed()
    params = [*model.parameters()]
    before = {**switches(), **of_modules(model)}
    H = fh.Hessian.from_closure(
        lambda: (model(x) - y[:, :2]).square().mean(), params, engine=engine
    )
    V = torch.eye(H.n, dtype=F64)
    found = H @ V
    H.gradient()
    H.loss(V[0])
    fh.density(H, steps=3)
    assert {**switches(), **of_modules(model)} == before
    assert all(module.training for module in model.modules())
    names = [name for name, _ in model.named_parameters()]

    def loss(pieces: list[Tensor]) -> Tensor:
        values = dict(zip(names, pieces, strict=True))
        values |= {name: buffer.clone() for name, buffer in model.named_buffers()}
        return (torch.func.functional_call(model, values, (x,)) - y[:, :2]).square().mean()

    bound = 1e-9 if engine != "difference" else 1e-6
    torch.testing.assert_close(found, hessian(loss, params), rtol=bound, atol=bound)
    assert {**switches(), **of_modules(model)} == before


class Counts(nn.Module):
    """Its result depends on the number of calls, and each call registers a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.ones((), dtype=F64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.register_buffer("scratch", x.detach())
        return x * self.calls


@each_engine
def test_a_counter_inside_another_module_starts_where_it_was(engine: str) -> None:
    """The module is found when it is called: no variable of the closure is the module itself."""
    w, inner = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True), Counts()
    box = [[[[[inner]]]]]
    H = fh.Hessian.from_closure(lambda: box[0][0][0][0][0](w).pow(3).sum(), [w], engine=engine)
    for _ in range(2):
        found = H @ torch.ones(2, dtype=F64)
        torch.testing.assert_close(found, 6 * 8 * w.detach(), rtol=1e-6, atol=0)
    assert float(inner.calls) == 1
    assert not hasattr(inner, "scratch")


def test_checkpointed_modules_and_modules_called_later_keep_their_buffers() -> None:
    model, x, y = normed()
    second, late = nn.BatchNorm1d(2).double(), [False]

    def closure() -> Tensor:
        out = checkpoint(model, x, use_reentrant=False)
        return ((second(out) if late[0] else out) - y[:, :2]).square().mean()

    before = of_modules(model, second)
    H = fh.Hessian.from_closure(closure, model.parameters(), engine="recompute")
    H @ torch.ones(H.n, dtype=F64)
    late[0] = True
    H @ torch.ones(H.n, dtype=F64)
    assert of_modules(model, second) == before


@pytest.mark.filterwarnings("ignore:closure writes into")
def test_modules_called_in_another_thread_are_left_alone() -> None:
    """It updates its own statistics during a product, as it would without one."""
    model, x, y = normed()
    other = nn.BatchNorm1d(3).double()

    def closure() -> Tensor:
        thread = threading.Thread(target=other, args=(x,))
        thread.start()
        thread.join()
        return (model(x) - y[:, :2]).square().mean()

    H = fh.Hessian.from_closure(closure, model.parameters())
    calls = int(other.num_batches_tracked)
    assert calls > 0
    H.loss()
    assert int(other.num_batches_tracked) == calls + 1


@pytest.mark.filterwarnings("ignore:closure writes into")
@pytest.mark.parametrize("to_none", [True, False])
def test_a_closure_that_clears_gradients_leaves_them_as_they_were(to_none: bool) -> None:
    model, x, y = normed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).sum().backward()
    model[1].reset_running_stats()
    before = {**switches(), **of_modules(model)}
    held = [p.grad.clone() for p in model.parameters() if p.grad is not None]

    def closure(differentiates: bool = True) -> Tensor:
        optimizer.zero_grad(set_to_none=to_none)
        loss = (model(x) - y[:, :2]).square().mean()
        if differentiates:
            loss.backward()
        return loss

    weights = [model[3].weight]
    with pytest.raises(RuntimeError, match=r"without zero_grad.. and backward..") as error:
        fh.Hessian.from_closure(closure, weights)
    assert "\n" not in str(error.value)
    H = fh.Hessian.from_closure(lambda: closure(False), weights)
    found = H @ torch.eye(H.n, dtype=F64)
    assert {**switches(), **of_modules(model)} == before
    for p, grad in zip(model.parameters(), held, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, grad, rtol=0, atol=0)
    z = torch.tanh(F.batch_norm(model[0](x), None, None, model[1].weight, model[1].bias, True))
    block = z.T @ z / 6  # of the mean over 6 x 2 numbers: 2 / 12 z'z for each output
    torch.testing.assert_close(found, torch.block_diag(block, block).detach())


def test_a_closure_that_writes_into_a_tensor_is_warned_of_and_the_advice_works() -> None:
    model, x, y = normed()
    mean, var = torch.zeros(4, dtype=F64), torch.ones(4, dtype=F64)

    def closure(copies: bool = False) -> Tensor:
        statistics = (mean.clone(), var.clone()) if copies else (mean, var)
        out = model[3](F.batch_norm(model[0](x), *statistics, training=True))
        return (out - y[:, :2]).square().mean()

    with pytest.warns(UserWarning, match=r"^closure writes into variable 'mean' .*clone") as told:
        fh.Hessian.from_closure(closure, [model[0].weight])
    assert len(told) == 1
    assert told[0].filename == __file__
    mean.zero_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        H = fh.Hessian.from_closure(lambda: closure(True), [model[0].weight])
        fh.density(H, steps=3)
    assert not mean.any()


def test_no_warning_for_closures_that_keep_what_they_compute() -> None:
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    seen: list[Tensor] = []

    def closure() -> Tensor:
        seen.append(w.detach().clone())
        closure.last = w.sum().detach()  # type: ignore[attr-defined]
        return w.pow(3).sum()

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fh.Hessian.from_closure(closure, [w])


def test_interrupts_leave_a_closures_modules_unchanged() -> None:
    model, x, y = normed()
    model(x).sum().backward()
    H = fh.Hessian.from_closure(
        lambda: (model(x) - y[:, :2]).square().mean(), model.parameters(), engine="recompute"
    )
    v = torch.ones(H.n, dtype=F64)
    want = H @ v
    world = lambda: {**switches(), **of_modules(model)}  # noqa: E731
    places = list(left_changed(lambda: H @ v, world, 23))
    assert len(places) > 30
    assert [place for place in places if place[1]] == []
    torch.testing.assert_close(H @ v, want)
