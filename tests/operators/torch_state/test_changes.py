"""Products follow what the user changes after the construction of an operator."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fasthessian as fh
from fasthessian.operators.torch_state import snapshot
from tests.support.changing import Net, Penalised, by_global, problem, reset, set_global, set_offset
from tests.support.models import ENGINES, F64, columns, dense, error

each_engine = pytest.mark.parametrize("engine", ENGINES)


class Focal(nn.Module):
    """A criterion with an option, and with a module that has options."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.inner = 0.0, nn.CrossEntropyLoss(reduction="none")

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        losses = self.inner(z, y)
        return (losses * losses.neg().exp().neg().add(1) ** self.gamma).mean()


def by_closure() -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[float], None]]:
    """A criterion that reads a variable of its enclosing function, and a setter of the variable."""
    strength = 0.1

    def change(value: float) -> None:
        nonlocal strength
        strength = value

    return lambda z, y: F.cross_entropy(z, y) + strength * z.square().mean(), change


def shuffle(p: Any) -> None:
    np.random.default_rng(3).shuffle(p.array)


CHANGES: dict[str, tuple[Any, Callable[[Any], Any]]] = {
    "inputs by NumPy": (None, lambda p: np.multiply(p.array, -1.7, out=p.array)),
    "one input by NumPy": (None, lambda p: p.array.__setitem__((2, 1), 3.0)),
    "inputs shuffled by NumPy": (None, shuffle),
    "inputs by .data": (None, lambda p: p.x.data.mul_(2)),
    "targets by .data": (None, lambda p: p.y.data.copy_(1 - p.y)),
    "label_smoothing": (None, lambda p: setattr(p.criterion, "label_smoothing", 0.5)),
    "reduction": (None, lambda p: setattr(p.criterion, "reduction", "sum")),
    "ignore_index": (None, lambda p: setattr(p.criterion, "ignore_index", 0)),
    "gamma of a module": (Focal, lambda p: setattr(p.criterion, "gamma", 2.0)),
    "an option two modules deep": (
        Focal, lambda p: setattr(p.criterion.inner, "label_smoothing", 0.3)),
    "an attribute of an object": (Penalised, lambda p: setattr(p.criterion, "strength", 0.9)),
    "a keyword of a partial": (
        lambda: functools.partial(F.cross_entropy, label_smoothing=0.1),
        lambda p: p.criterion.keywords.update(label_smoothing=0.6)),
    "a global": (lambda: by_global, set_global),
    "a float of the model": (None, lambda p: setattr(p.model, "temperature", 2.0)),
    "a field of its config": (None, lambda p: setattr(p.model.config, "gain", 0.5)),
    "an entry of a list in a dict": (
        None, lambda p: p.model.scales["input"].__setitem__(1, 3.0)),
    "a tensor that is no buffer": (None, lambda p: p.model.shift.data.add_(0.5)),
    "a NumPy array": (None, lambda p: p.model.mask.__setitem__(0, 0.0)),
    "an attribute of its class": (None, lambda p: setattr(Net, "power", 1.5)),
    "a global that forward reads": (None, set_offset),
    "a function": (None, lambda p: setattr(p.model, "gate", torch.tanh)),
    "a layer without parameters": (None, lambda p: setattr(p.model, "act", nn.Softplus())),
    "a forward hook": (
        None, lambda p: p.model.act.register_forward_hook(lambda module, args, out: 2 * out)),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _global() -> Any:
    yield
    reset()


@each_engine
@pytest.mark.parametrize("sums", [False, True], ids=["copies", "sums"])
@pytest.mark.parametrize("name", CHANGES)
def test_products_follow_what_changed(
    name: str, sums: bool, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshot, "COPIED", 0 if sums else snapshot.COPIED)
    make, change = CHANGES[name]
    p = problem(make and make())
    A = fh.Hessian(p.model, p.criterion, (p.x, p.y), engine=engine)
    before = columns(A)
    change(p)
    exact = dense(p.model, p.criterion, (p.x, p.y))
    assert error(before, exact) > 1e-3
    assert error(columns(A), exact) < 1e-12
    assert error(columns(A), exact) < 1e-12


@each_engine
def test_products_follow_a_variable_of_the_function_around_the_criterion(engine: str) -> None:
    criterion, change = by_closure()
    p = problem(criterion)
    A = fh.Hessian(p.model, criterion, (p.x, p.y), engine=engine)
    before = columns(A)
    change(0.9)
    exact = dense(p.model, criterion, (p.x, p.y))
    assert error(before, exact) > 1e-3 and error(columns(A), exact) < 1e-12


@each_engine
def test_products_follow_the_probability_of_dropout(engine: str) -> None:
    p = problem()
    p.model.act = nn.Dropout(0.2)
    A = fh.Hessian(p.model, p.criterion, (p.x, p.y), engine=engine, mode="train")
    before = columns(A)
    p.model.act.p = 0.7
    fresh = columns(fh.Hessian(p.model, p.criterion, (p.x, p.y), mode="train"))
    assert error(before, fresh) > 1e-3 and error(columns(A), fresh) < 1e-12


def _half(seed: int, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(4, 3, dtype=F64, generator=g), torch.randint(2, (4,), generator=g)


LISTS: dict[str, Callable[[list[Any]], Any]] = {
    "replaced": lambda b: b.__setitem__(1, _half(7, 3.0)),
    "appended": lambda b: b.append(_half(8)),
    "removed": lambda b: b.pop(0),
    "emptied and filled": lambda b: b.__setitem__(slice(None), [_half(9), _half(10), _half(11)]),
}


@each_engine
@pytest.mark.parametrize("name", LISTS)
def test_products_follow_the_list_of_batches(name: str, engine: str) -> None:
    p, batches = problem(), [_half(1), _half(2)]
    A = fh.Hessian(p.model, p.criterion, batches, engine=engine)
    before = columns(A)
    LISTS[name](batches)
    whole = tuple(torch.cat(tensors) for tensors in zip(*batches, strict=True))
    exact = dense(p.model, p.criterion, whole)
    assert error(before, exact) > 1e-3 and error(columns(A), exact) < 1e-12


@each_engine
def test_products_follow_the_entries_of_a_mapping(engine: str) -> None:
    p = problem()
    batch = {"x": p.x, "temper": 1.0}

    class Tempered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = p.model

        def forward(self, x: Tensor, temper: float) -> Tensor:
            return self.net(x) * temper

    def criterion(z: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(z, p.y)

    model = Tempered()
    A = fh.Hessian(model, criterion, batch, engine=engine)
    for key, value in (("temper", 2.5), ("x", p.x.flip(0).clone())):
        before = columns(A)
        batch[key] = value
        fresh = columns(fh.Hessian(model, criterion, dict(batch)))
        assert error(before, fresh) > 1e-3 and error(columns(A), fresh) < 1e-12


@each_engine
def test_products_follow_the_dataset_of_a_loader(engine: str) -> None:
    p = problem()
    A = fh.Hessian(p.model, p.criterion, DataLoader(TensorDataset(p.x, p.y), 4), engine=engine)
    before = columns(A)
    p.array *= -1.7
    exact = dense(p.model, p.criterion, (p.x, p.y))
    assert error(before, exact) > 1e-3 and error(columns(A), exact) < 1e-12


@each_engine
def test_products_follow_what_a_closure_reads(engine: str) -> None:
    w, t = torch.tensor([1.0, 2.0], requires_grad=True), torch.tensor([3.0, 4.0])
    A = fh.Hessian.from_closure(lambda: (t * w.pow(3)).sum(), [w], engine=engine)
    assert torch.equal(A @ torch.ones(2), torch.tensor([18.0, 48.0]))
    t.data.mul_(2)
    assert torch.equal(A @ torch.ones(2), torch.tensor([36.0, 96.0]))


def test_gauss_newton_checks_a_changed_criterion_again() -> None:
    p = problem(Penalised())
    G = fh.GaussNewton(p.model, p.criterion, (p.x, p.y))
    v = torch.ones(G.n, dtype=F64)
    assert float(v @ (G @ v)) > 0
    p.criterion.strength = -5.0
    with pytest.raises(ValueError, match="not convex"):
        G @ v


def test_the_drop_in_follows_data_written_through_numpy() -> None:
    p = problem()
    hessian = fh.pyhessian.hessian(p.model, p.criterion, data=(p.x, p.y), cuda=False)
    before = [g.clone() for g in hessian.gradsH]
    hessian.eigenvalues()
    p.array *= -1.7
    fresh = fh.pyhessian.hessian(p.model, p.criterion, data=(p.x, p.y), cuda=False)
    assert not torch.allclose(before[0], fresh.gradsH[0])
    for mine, want in zip(hessian.gradsH, fresh.gradsH, strict=True):
        assert torch.equal(mine, want)
    want = columns(fh.Hessian(p.model, p.criterion, (p.x, p.y)))
    top = float(torch.linalg.eigvalsh(want).abs().max())
    assert abs(abs(hessian.eigenvalues()[0][0]) - top) < 2e-3 * top
