"""A change during a run of an algorithm is refused, and the message names what changed."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fasthessian as fh
from fasthessian.operators.base import multiply
from fasthessian.operators.request import Request
from fasthessian.operators.torch_state import snapshot
from tests.support.changing import Net, problem
from tests.support.models import ENGINES, F64, dense, error, refused

pytestmark = pytest.mark.slow

each_engine = pytest.mark.parametrize("engine", ENGINES)


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
    """A progress callback that makes one change after ``at`` products."""
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
def test_a_run_refuses_changes_and_names_a_way_out(run: str, move: str, engine: str) -> None:
    p = problem()
    change, words, owner = MOVES[move]
    A = fh.Hessian(p.model, p.criterion, (p.x, p.y), engine=engine)
    with moving(p, change, 2) as tell:
        refused(lambda: RUNS[run](A, tell), RuntimeError, words + r".*deepcopy\(" + owner)
    RUNS[run](A, None)  # the next run follows the change
    held = SimpleNamespace(model=p.model, criterion=p.criterion, data=(p.x, p.y))
    setattr(held, owner, copy.deepcopy(getattr(held, owner)))
    B = fh.Hessian(held.model, held.criterion, held.data, engine=engine)
    with moving(p, change, 2) as tell:
        RUNS[run](B, tell)


def test_the_last_poll_finds_what_deferred_products_do_not_compare() -> None:
    p = problem()
    A = fh.Hessian(p.model, p.criterion, (p.x, p.y))
    V = torch.ones(1, A.n, dtype=F64)
    out = torch.empty_like(V)
    count, _ = A._kept.changes(poll=True)
    p.model.b.weight.data.mul_(1.01)
    multiply([Request(A, V, out, deferred=True)])
    assert A._kept.changes()[0] == count
    assert A._kept.changes(poll=True) == (count + 1, "parameter 'b.weight'")
    _step(p)
    multiply([Request(A, V, out, deferred=True)])  # autograd's version counter shows this one
    assert A._kept.changes() == (count + 2, "parameter 'b.weight'")
    exact = dense(p.model, p.criterion, (p.x, p.y))
    assert error(out[0], exact.sum(1)) < 1e-12


class Busy(nn.Module):
    """A network that counts its calls and keeps what it computed."""

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
    """Evaluate the model at other weights, and restore the old ones bit for bit."""
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
def test_callbacks_that_change_nothing_are_accepted(run: str, callback: Any, engine: str) -> None:
    p = problem()
    p.model, p.calls = Busy().double(), 0
    p.x[1, 1] = torch.nan  # NaN must count as unchanged
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


def test_kept_graphs_are_used_as_long_as_nothing_changes() -> None:
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
