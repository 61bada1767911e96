"""What changes after construction: followed between calls, refused by name during a run."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fasthessian as fh
from fasthessian.operators.base import multiply
from fasthessian.operators.request import Request
from fasthessian.operators.torch_state import snapshot
from tests.support.models import ENGINES, F64, columns, dense, error, refused

each_engine = pytest.mark.parametrize("engine", ENGINES)


class Net(nn.Module):
    """A network whose outputs depend on attributes of every form."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.act, self.b = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)
        self.temperature = 1.0
        self.config = SimpleNamespace(gain=1.0)
        self.scales = {"input": [1.0, 1.0, 1.0]}
        self.shift = torch.zeros(4, dtype=F64)  # no buffer
        self.mask = np.ones(4)
        self.gate: Callable[[Tensor], Tensor] = torch.sigmoid

    power = 1.0

    def forward(self, x: Tensor) -> Tensor:
        x = (OFFSET + self.power * x) * torch.tensor(self.scales["input"], dtype=x.dtype)
        h = self.act(self.a(x) + self.shift) * torch.from_numpy(self.mask.copy())
        return self.b(self.gate(h)) * self.config.gain / self.temperature


class Focal(nn.Module):
    """A criterion with an option of its own, and one of a module inside."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma, self.inner = 0.0, nn.CrossEntropyLoss(reduction="none")

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        losses = self.inner(z, y)
        return (losses * losses.neg().exp().neg().add(1) ** self.gamma).mean()


class Penalised:
    """A criterion that is no module."""

    def __init__(self) -> None:
        self.strength = 0.1

    def __call__(self, z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z, y) + self.strength * z.square().mean()


def by_closure() -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[float], None]]:
    """A criterion that reads a variable of the function around it, and what sets that."""
    strength = 0.1

    def change(value: float) -> None:
        nonlocal strength
        strength = value

    return lambda z, y: F.cross_entropy(z, y) + strength * z.square().mean(), change


STRENGTH = 0.1
OFFSET = 0.0


def by_global(z: Tensor, y: Tensor) -> Tensor:
    """A criterion that reads a global variable."""
    return F.cross_entropy(z, y) + STRENGTH * z.square().mean()


def problem(criterion: Any = None) -> SimpleNamespace:
    """A network, its criterion, and data whose inputs share memory with a NumPy array."""
    torch.manual_seed(0)
    a = np.random.default_rng(0).standard_normal((6, 3))
    return SimpleNamespace(
        model=Net().double(),
        criterion=criterion or nn.CrossEntropyLoss(),
        array=a,
        x=torch.from_numpy(a),
        y=torch.randint(2, (6,)),
    )


def set_global(p: Any) -> None:
    globals()["STRENGTH"] += 0.7


def set_offset(p: Any) -> None:
    globals()["OFFSET"] += 0.7


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
    globals().update(STRENGTH=0.1, OFFSET=0.0)
    Net.power = 1.0


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


def test_gauss_newton_looks_again_at_a_criterion_that_changed() -> None:
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


# --- during a run

RUNS: dict[str, Callable[[Any, Any], Any]] = {
    "eigsh": lambda A, tell: fh.eigsh(A, 3, tol=1e-10, progress=tell),
    "trace": lambda A, tell: fh.trace(A, rtol=1e-4, max_matvecs=60, progress=tell),
    "density": lambda A, tell: fh.density(A, steps=8, probes=3, progress=tell),
    "spectrum": lambda A, tell: fh.spectrum(A, progress=tell),
    "landscape": lambda A, tell: fh.landscape(
        A, torch.eye(A.n, dtype=A.dtype)[:2], points=4, progress=tell),
    "blocks": lambda A, tell: fh.eigsh(A.blocks("layer"), 2, tol=1e-10, progress=tell),
}  # fmt: skip


def _step(p: Any) -> None:
    with torch.no_grad():
        p.model.b.weight.mul_(1.003)


MOVES: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "a step": (_step, "parameter 'b.weight' changed during the run", "model"),
    "behind autograd": (
        lambda p: p.model.b.weight.data.mul_(1.003),
        "parameter 'b.weight' changed during the run", "model"),
    "data": (
        lambda p: np.multiply(p.array, 1.01, out=p.array), r"data\[0\] changed during the run",
        "data"),
    "an option": (
        lambda p: setattr(p.criterion, "label_smoothing", p.criterion.label_smoothing + 0.01),
        "criterion.label_smoothing changed during the run", "criterion"),
    "an attribute": (
        lambda p: setattr(p.model, "temperature", p.model.temperature + 0.01),
        "model.temperature changed during the run", "model"),
}  # fmt: skip


@contextlib.contextmanager
def moving(p: Any, move: Callable[[Any], Any], at: int) -> Any:
    """A progress callback that moves something once ``at`` products were made."""
    moved = []

    def tell(done: int, total: int | None) -> None:
        if done >= at and not moved:
            moved.append(done)
            move(p)

    yield tell
    assert moved


@each_engine
@pytest.mark.filterwarnings("ignore::fasthessian.ConvergenceWarning")
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("run", RUNS)
def test_a_run_refuses_what_moves_and_says_a_way_out(run: str, move: str, engine: str) -> None:
    p = problem()
    change, words, owner = MOVES[move]
    A = fh.Hessian(p.model, p.criterion, (p.x, p.y), engine=engine)
    with moving(p, change, 2) as tell:
        refused(lambda: RUNS[run](A, tell), RuntimeError, words + r".*deepcopy\(" + owner)
    RUNS[run](A, None)  # followed by the next run
    held = SimpleNamespace(model=p.model, criterion=p.criterion, data=(p.x, p.y))
    setattr(held, owner, copy.deepcopy(getattr(held, owner)))
    B = fh.Hessian(held.model, held.criterion, held.data, engine=engine)
    with moving(p, change, 2) as tell:
        RUNS[run](B, tell)


def test_the_last_look_finds_what_deferred_products_do_not_compare() -> None:
    p = problem()
    A = fh.Hessian(p.model, p.criterion, (p.x, p.y))
    V = torch.ones(1, A.n, dtype=F64)
    out = torch.empty_like(V)
    count, _ = A._kept.changes(look=True)
    p.model.b.weight.data.mul_(1.01)
    multiply([Request(A, V, out, deferred=True)])
    assert A._kept.changes()[0] == count
    assert A._kept.changes(look=True) == (count + 1, "parameter 'b.weight'")
    _step(p)
    multiply([Request(A, V, out, deferred=True)])  # autograd's version tells of this one
    assert A._kept.changes() == (count + 2, "parameter 'b.weight'")
    exact = dense(p.model, p.criterion, (p.x, p.y))
    assert error(out[0], exact.sum(1)) < 1e-12


class Busy(nn.Module):
    """A network that counts its calls and remembers what it computed."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.drop, self.calls = Net(), nn.Dropout(0.5), 0
        self.last: Tensor | None = None
        self.longest = torch.zeros(0, dtype=F64)
        self.history: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if len(x) > len(self.longest):  # a cache
            self.longest = torch.ones(len(x), dtype=F64)
        self.last = self.net(self.drop(x)) * self.longest[: len(x), None]
        self.history.append(float(self.last.detach().sum()))
        return self.last


def _evaluate(p: Any) -> None:
    p.model.train()
    p.model(p.x.repeat(2, 1)).sum().backward()
    p.model.eval()
    p.calls += 1


def _swap(p: Any) -> None:
    """Evaluate other weights, and put these back bit for bit."""
    held = {name: t.clone() for name, t in p.model.state_dict().items()}
    with torch.no_grad():
        for q in p.model.parameters():
            q.mul_(0.9)
    p.model(p.x)
    p.model.load_state_dict(held)


def _ask(p: Any) -> None:
    p.A @ torch.ones(p.A.n, dtype=F64)
    p.A.gradient()
    p.A.loss(torch.ones(p.A.n, dtype=F64))
    torch.rand(3)


@each_engine
@pytest.mark.filterwarnings("ignore::fasthessian.ConvergenceWarning")
@pytest.mark.parametrize("callback", [_evaluate, _swap, _ask])
@pytest.mark.parametrize("run", ["eigsh", "landscape", "blocks"])
def test_what_changes_nothing_is_no_move(run: str, callback: Any, engine: str) -> None:
    p = problem()
    p.model, p.calls = Busy().double(), 0
    p.x[1, 1] = torch.nan  # which equals itself here
    p.model.net.register_forward_pre_hook(lambda module, args: (args[0].nan_to_num(),))
    p.A = A = fh.Hessian(p.model, p.criterion, [(p.x[:2], p.y[:2]), (p.x, p.y)], engine=engine)
    want = RUNS[run](A, None)

    def tell(done: int, total: int | None) -> None:
        callback(p)

    found = RUNS[run](A, tell)
    if run == "blocks":
        want, found = want["net.a"], found["net.a"]
    key = "losses" if run == "landscape" else "values"
    assert torch.equal(getattr(found, key), getattr(want, key))


def test_kept_graphs_serve_as_long_as_nothing_changes() -> None:
    p = problem()
    p.model = Busy().double()
    A = fh.Hessian(p.model, p.criterion, [(p.x[:2], p.y[:2]), (p.x, p.y)], engine="retained")
    v = torch.ones(A.n, dtype=F64)
    A @ v
    calls = p.model.calls
    for _ in range(3):
        A @ v
    fh.eigsh(A, 2)
    assert p.model.calls == calls


def test_a_run_compares_the_values_of_the_data_at_its_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    p = problem()
    monkeypatch.setattr(snapshot, "COPIED", 0)
    A = fh.Hessian(p.model, p.criterion, (p.x, p.y))
    compared, sums = [], snapshot._checksums

    def counting(tensor: Tensor) -> Tensor:
        compared.append(tensor is p.x)
        return sums(tensor)

    monkeypatch.setattr(snapshot, "_checksums", counting)
    assert fh.density(A, steps=10).matvecs == 10 and sum(compared) == 2
    for _ in range(3):
        A @ torch.ones(A.n, dtype=F64)
    assert sum(compared) == 5
