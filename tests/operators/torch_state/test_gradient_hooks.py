"""Hooks that change gradients do not change the matrices, and they stay in place."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fasthessian as fh
from tests.support.models import EACH_ENGINE, columns, dense, error, gauss_newton

F64 = torch.float64
each_engine = pytest.mark.parametrize("engine", EACH_ENGINE)


class Net(nn.Module):
    """Every forward pass puts ``hook`` on two activations."""

    def __init__(self, hook: Callable[[Tensor], Tensor | None] | None = None) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(2, 3, 2), nn.BatchNorm1d(3)
        self.last, self.hook = nn.Linear(3, 3), hook

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.hook is not None:
            x.register_hook(self.hook)
        x = torch.tanh(self.norm(x)).mean(2)
        if self.hook is not None:
            x.register_hook(self.hook)
        return self.last(x)


def made(hook: Any = None) -> tuple[Net, nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    data = torch.randn(6, 2, 4, dtype=F64), torch.arange(6) % 3
    return Net(hook).double(), nn.CrossEntropyLoss(), data


def clip(gradient: Tensor) -> Tensor:
    return gradient.clamp(-1e-3, 1e-3)


def mask(gradient: Tensor) -> Tensor:
    return gradient * (torch.arange(gradient.numel()).view_as(gradient) % 2)


def written(gradient: Tensor) -> None:
    with torch.no_grad():
        gradient.mul_(3)


def on_parameters(model: Net) -> None:
    for p, hook in zip(model.parameters(), (clip, mask, written, clip, mask, mask), strict=True):
        p.register_hook(hook)


def on_modules(model: Net) -> None:
    model.norm.register_full_backward_hook(lambda m, gi, go: (5 * gi[0],))
    model.last.register_full_backward_hook(lambda m, gi, go: (clip(gi[0]),))
    model.norm.register_full_backward_pre_hook(lambda m, go: (2 * go[0],))


def on_forward(model: Net) -> None:
    """Forward hooks that put hooks on activations."""
    model.first.register_forward_hook(lambda m, i, out: out.register_hook(clip) and None)
    model.last.register_forward_pre_hook(lambda m, i: i[0].register_hook(mask) and None)


def after_accumulation(model: Net) -> None:
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(lambda p: p.grad.zero_())


HOOKED = {f.__name__: f for f in (on_parameters, on_modules, on_forward, after_accumulation)}


def served(model: nn.Module, engine: str, where: str) -> bool:
    """Whether the engine works: in torch, modules with backward hooks have no forward mode."""
    return not (engine == "forward" and where == "on_modules")


@each_engine
@pytest.mark.parametrize("where", HOOKED)
def test_hooks_that_change_gradients_change_no_matrix(where: str, engine: str) -> None:
    want, G = dense(*made()), gauss_newton(*made())
    gradient = fh.Hessian(*made()).gradient()
    model, *rest = made()
    HOOKED[where](model)
    if not served(model, engine, where):
        with pytest.raises(RuntimeError, match="use engine='retained'"):
            fh.Hessian(model, *rest, engine=engine) @ torch.ones(len(want), dtype=F64)
        return
    bound = 1e-6 if engine == "difference" else 1e-12
    A = fh.Hessian(model, *rest, engine=engine)
    assert error(columns(A), want) < bound
    assert error(A.gradient(), gradient) < 1e-12
    assert error(columns(fh.GaussNewton(model, *rest, engine=engine)), G) < bound
    assert ("hooks on gradients do not act" in A.engine) == (where != "after_accumulation")


@each_engine
@pytest.mark.parametrize("hook", [clip, mask, written])
def test_hooks_of_the_forward_pass_change_no_matrix(hook: Any, engine: str) -> None:
    H = columns(fh.Hessian(*made(hook), engine=engine))
    assert error(H, dense(*made())) < (1e-6 if engine == "difference" else 1e-12)


# torch warns of hooks on a module whose inputs need no gradient, and of hooks of the older kind
@pytest.mark.filterwarnings("ignore:Full backward hook is firing|Using a non-full:Warning")
@pytest.mark.parametrize("full", [True, False])
def test_hooks_of_all_modules_change_no_matrix(full: bool) -> None:
    module = torch.nn.modules.module
    register = (
        module.register_module_full_backward_hook if full else module.register_module_backward_hook
    )

    def twice(m: nn.Module, gi: Any, go: Any) -> Any:
        return tuple(None if g is None else 2 * g for g in gi)

    want = dense(*made())
    handle = register(twice)
    try:
        model, criterion, data = made()
        A = fh.Hessian(model, criterion, data)
        H = columns(A)
        params = list(model.parameters())
        B = fh.Hessian.from_closure(lambda: criterion(model.eval()(data[0]), data[1]), params)
        closure = columns(B)
    finally:
        handle.remove()
        module._global_is_full_backward_hook = None
    assert error(H, want) < 1e-12 and error(closure, want) < 1e-12
    assert all("hooks on gradients do not act" in each.engine for each in (A, B))


def test_the_parameters_of_a_closure_and_the_blocks_of_layers() -> None:
    w = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    w.register_hook(lambda g: 10 * g)
    H = columns(fh.Hessian.from_closure(lambda: w.pow(3).sum(), [w]))
    assert torch.equal(H, torch.diag(torch.tensor([6.0, 12.0], dtype=F64)))
    want = {name: columns(B) for name, B in fh.Hessian(*made()).blocks("layer").items()}
    model, *rest = made(mask)
    for hook in (on_parameters, on_modules, on_forward):
        hook(model)
    for name, B in fh.Hessian(model, *rest).blocks("layer").items():
        assert error(columns(B), want[name]) < 1e-12


def test_hooks_are_in_place_after_products_and_after_exceptions() -> None:
    model, criterion, data = made(clip)
    on_parameters(model)
    on_modules(model)
    held = [dict(p._backward_hooks) for p in model.parameters()]
    x, y = data
    expected = torch.autograd.grad(criterion(model.eval()(x), y), list(model.parameters()))
    patched = Tensor.register_hook, nn.Module._get_backward_hooks
    A = fh.Hessian(model, criterion, data)
    A @ torch.ones(A.n, dtype=F64)
    model.hook = lambda g: torch.empty(1 << 50)
    forward = model.forward

    def failing(x: Tensor) -> Tensor:
        forward(x)
        raise KeyError("stop")

    model.forward = failing
    with pytest.raises(KeyError):
        fh.Hessian(model, criterion, data)
    model.forward, model.hook = forward, clip
    for p, hooks in zip(model.parameters(), held, strict=True):
        assert dict(p._backward_hooks) == hooks
    assert (Tensor.register_hook, nn.Module._get_backward_hooks) == patched
    again = torch.autograd.grad(criterion(model(x), y), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_hooks_added_later_are_suspended_too() -> None:
    want = dense(*made())
    model, *rest = made()
    A = fh.Hessian(model, *rest, engine="retained")
    assert error(columns(A), want) < 1e-12
    handle = model.first.weight.register_hook(mask)
    assert error(columns(A), want) < 1e-12
    assert mask in model.first.weight._backward_hooks.values()
    handle.remove()
    assert not model.first.weight._backward_hooks and error(columns(A), want) < 1e-12


def test_hooks_that_a_forward_pass_puts_on_parameters_are_removed() -> None:
    model, *rest = made()
    model.first.register_forward_hook(lambda m, i, o: m.weight.register_hook(mask) and None)
    for engine in ("retained", "recompute"):
        H = columns(fh.Hessian(model, *rest, engine=engine))
        assert error(H, dense(*made())) < 1e-12
    assert not model.first.weight._backward_hooks


class Forces(nn.Module):
    """Differentiates inside its forward pass, where hooks are part of the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
        self.hooked = True

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        inner, seen = self.net[1](self.net[0](x)), []
        inner.register_hook(seen.append)
        if self.hooked:
            inner.register_hook(lambda g: g * g)
        energy = self.net[2](inner)
        (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return torch.cat([energy, force, seen[0].sin()], 1)


@pytest.mark.parametrize("hooked", [False, True])
def test_hooks_act_where_the_model_differentiates_inside(hooked: bool) -> None:
    torch.manual_seed(0)
    model = Forces().double()
    model.hooked = hooked
    data = torch.randn(5, 2, dtype=F64), torch.randn(5, 7, dtype=F64)

    class Formula(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = copy.deepcopy(model.net)

        def forward(self, x: Tensor) -> Tensor:
            inner = self.net[1](self.net[0](x))
            slope = self.net[2].weight.expand(len(x), -1)
            after = slope * slope if hooked else slope
            force = (after * (1 - inner * inner)) @ self.net[0].weight
            return torch.cat([self.net[2](inner), force, slope.sin()], 1)

    want = dense(Formula(), F.mse_loss, data)
    for engine in ("retained", "recompute"):
        assert error(columns(fh.Hessian(model, F.mse_loss, data, engine=engine)), want) < 1e-12


def test_an_inner_step_with_a_clipped_gradient_is_part_of_the_loss() -> None:
    """As in MAML, the inner step differentiates with respect to the parameter that has the hook."""
    w = torch.tensor([0.3, -1.2, 0.7], dtype=F64, requires_grad=True)

    def loss(w: Tensor, scale: Callable[[Tensor], Tensor]) -> Tensor:
        (g,) = torch.autograd.grad(w.pow(4).sum(), w, create_graph=True)
        return (w - 0.1 * scale(g)).pow(4).sum()

    want = torch.autograd.functional.hessian(lambda w: loss(w, torch.tanh), w.detach())
    w.register_hook(torch.tanh)
    H = columns(fh.Hessian.from_closure(lambda: loss(w, lambda g: g), [w]))
    assert error(H, want) < 1e-12


def test_a_thread_that_trains_meanwhile_keeps_its_hooks() -> None:
    """Its forward passes register hooks while a product has replaced torch's function for that."""
    model, criterion, data = made()
    other, seen = made(lambda g: seen.append(1))[0], []

    def train() -> None:
        criterion(other(data[0]), data[1]).backward()

    def forward(x: Tensor) -> Tensor:
        thread = threading.Thread(target=train)
        thread.start()
        thread.join()
        return Net.forward(model, x)

    model.forward = forward
    A = fh.Hessian(model, criterion, data, engine="recompute")
    before = len(seen)
    A @ torch.ones(A.n, dtype=F64)
    assert len(seen) >= before + 2
