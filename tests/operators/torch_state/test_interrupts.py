"""After a Ctrl-C or another exception at any line, everything is as it was before."""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset, get_worker_info

import fasthessian as fh
from fasthessian.operators.torch_state.scopes import Scope, UndoLog, restored, scope
from tests.support.interrupts import interrupted, left_changed, of_modules, switches

pytestmark = pytest.mark.slow

Call = Callable[[], object]


class Net(nn.Module):
    """Layers that are replaced, weight normalisation, and a context inside the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)
        self.last = nn.utils.parametrizations.weight_norm(nn.Linear(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            x = x + 0.1 * torch.rand(())
        return self.last(torch.tanh(self.norm(self.conv(x))).flatten(1))


def made() -> tuple[Net, nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    model = Net().train()
    model.conv.weight.register_hook(lambda grad: grad)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return model, nn.CrossEntropyLoss(), (torch.randn(4, 1, 4, 4), torch.tensor([0, 1, 0, 1]))


def nothing_changed(call: Call, model: nn.Module, step: int, first: int = 0) -> int:
    """Interrupt the call at every ``step``-th line; return the number of interrupts."""
    places = list(left_changed(call, lambda: {**switches(), **of_modules(model)}, step, first))
    assert [place for place in places if place[1]] == []
    return len(places)


@pytest.mark.parametrize(
    ("engine", "step"), [("retained", 7), ("recompute", 17), ("forward", 53), ("difference", 53)]
)
def test_a_product_interrupted_at_any_line_restores_everything(engine: str, step: int) -> None:
    model, criterion, data = made()
    H = fh.Hessian(model, criterion, data, engine=engine)
    v = torch.ones(H.n)
    want = H @ v
    assert nothing_changed(lambda: H @ v, model, step) > 40
    torch.testing.assert_close(H @ v, want)
    torch.testing.assert_close(fh.Hessian(model, criterion, data, engine=engine) @ v, want)


@pytest.mark.parametrize("kind", [fh.GaussNewton, fh.EmpiricalFisher])
def test_interrupted_products_of_other_matrices_restore_everything(kind: Any) -> None:
    model, criterion, data = made()
    A = kind(model, criterion, data, engine="recompute")
    want = A @ torch.ones(A.n)
    assert nothing_changed(lambda: A @ torch.ones(A.n), model, 59) > 20
    torch.testing.assert_close(A @ torch.ones(A.n), want)


CALLS: dict[str, tuple[Callable[[Any], object], int]] = {
    "loss": (lambda H: H.loss(torch.ones(H.n)), 59),
    "gradient": (lambda H: H.gradient(torch.ones(H.n)), 61),
    "check": (lambda H: H.check(), 1499),
    "eigsh": (lambda H: fh.eigsh(H, max_matvecs=3, tol=10.0), 83),
    "trace": (lambda H: fh.trace(H, max_matvecs=3, rtol=0.5), 29),
    "density": (lambda H: fh.density(H, steps=3), 97),
    "landscape": (lambda H: fh.landscape(H, torch.ones(H.n), 0.1, 3), 293),
    "blocks": (lambda H: fh.trace(H.blocks("layer"), max_matvecs=3, rtol=0.5), 83),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CALLS)
def test_other_interrupted_calls_restore_everything(name: str) -> None:
    model, criterion, data = made()
    H = fh.Hessian(model, criterion, data)
    v = torch.ones(H.n)
    want, (call, step) = H @ v, CALLS[name]
    call(H)
    assert nothing_changed(lambda: call(H), model, step) > 10
    assert not H._kept._runs  # a run that stays open would switch off the comparison of data
    torch.testing.assert_close(H @ v, want)


def test_interrupted_constructors_restore_everything() -> None:
    model, criterion, data = made()
    loader = DataLoader(TensorDataset(*data), batch_size=3)
    for call in (
        lambda: fh.Hessian(model, criterion, data),
        lambda: fh.Hessian(model, criterion, loader, memory_budget=0),
        lambda: fh.Hessian.from_closure(
            lambda: criterion(model(data[0]), data[1]), model.parameters()
        ),
    ):
        call()
        assert nothing_changed(call, model, 997) > 10


def test_a_change_seen_by_an_interrupted_product_is_not_forgotten() -> None:
    """The change concerns the weights, and the targets, some of which become ignored."""
    model, criterion, data = made()
    H = fh.Hessian(model, criterion, [data, data])
    v, at = torch.ones(H.n), 0
    while True:
        with torch.no_grad():
            model.last.bias.add_(0.5)
            data[1][at % 4] = -100 if at % 2 else 1
        if not interrupted(lambda: H @ v, at):
            break
        torch.testing.assert_close(H @ v, fh.Hessian(model, criterion, [data, data]) @ v)
        at += 151
    assert at > 10 * 151


def test_an_interrupted_check_of_a_function_is_repeated() -> None:
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            with torch.no_grad():
                return 3 * ctx.saved_tensors[0] ** 2 * grad

    late = [False]
    w = torch.tensor([1.0, 2.0], requires_grad=True)
    places = set()
    for at in range(300, 1600, 37):
        late[0] = False
        H = fh.Hessian.from_closure(
            lambda: Cube.apply(w).sum() if late[0] else w.pow(3).sum(), [w], engine="recompute"
        )
        late[0] = True
        places.add(interrupted(lambda: H @ torch.ones(2), at).partition(":")[0])  # noqa: B023
        torch.testing.assert_close(H @ torch.ones(2), torch.tensor([6.0, 12.0]), rtol=1e-3, atol=0)
    assert "function_check.py" in places


def test_an_interrupted_product_releases_the_lock() -> None:
    model, criterion, data = made()
    H = fh.Hessian(model, criterion, data)
    want, found = H @ torch.ones(H.n), []
    assert interrupted(lambda: H @ torch.ones(H.n), 300)
    thread = threading.Thread(target=lambda: found.append(H @ torch.ones(H.n)), daemon=True)
    thread.start()
    thread.join(20)
    torch.testing.assert_close(found[0], want)


def test_functions_that_others_replaced_stay_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    original = F.conv2d

    def logged(*args: Any, **named: Any) -> Tensor:
        return original(*args, **named)

    monkeypatch.setattr(F, "conv2d", logged)
    model, criterion, data = made()
    fh.Hessian(model, criterion, data)
    assert F.conv2d is logged


class Crowd(Dataset[tuple[Tensor, int]]):
    """At one sample a worker kills itself or interrupts the parent, as the file says."""

    def __init__(self, order: Path) -> None:
        self.order = order

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if i == 7 and get_worker_info() is not None and self.order.exists():
            if self.order.read_text() == "die":
                os._exit(3)
            os.kill(os.getppid(), signal.SIGINT)
        return torch.ones(3) * i, i % 2


@pytest.fixture
def sigint_raises() -> Iterator[None]:
    """Let SIGINT raise KeyboardInterrupt: shells make background commands ignore it."""
    held = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, held)


@pytest.mark.usefixtures("sigint_raises")
@pytest.mark.parametrize("order", ["die", "interrupt"])
@pytest.mark.parametrize("constructed", [False, True])
def test_a_worker_that_dies_or_interrupts_changes_nothing(
    order: str, constructed: bool, tmp_path: Path
) -> None:
    model, place = nn.Linear(3, 2), tmp_path / "order"
    loader = DataLoader(Crowd(place), batch_size=4, num_workers=1)
    make = lambda: fh.Hessian(model, nn.CrossEntropyLoss(), loader, memory_budget=0)  # noqa: E731
    H = make()
    want, before = H @ torch.ones(8), {**switches(), **of_modules(model)}
    place.write_text(order)
    with pytest.raises(RuntimeError if order == "die" else KeyboardInterrupt) as error:
        make() if constructed else H @ torch.ones(8)
    assert "\n" not in str(error.value)
    assert {**switches(), **of_modules(model)} == before
    place.unlink()
    torch.testing.assert_close((make() if constructed else H) @ torch.ones(8), want)


@pytest.mark.parametrize("engine", ["retained", "recompute", "forward", "difference"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_errors_inside_a_model_with_contexts_of_its_own(engine: str, error: type) -> None:
    fails = [0]

    class Fails(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=[]):
                random.random()
                out = super().forward(x)
                fails[0] -= 1
                if not fails[0]:
                    raise error
                return out

    _, criterion, data = made()
    model = Fails().train()
    make = lambda: fh.Hessian(model, criterion, data, engine=engine, memory_budget=0)  # noqa: E731
    before = {**switches(), **of_modules(model)}
    for count in range(1, 6):
        fails[0] = count
        with pytest.raises(error):
            make()
        assert {**switches(), **of_modules(model)} == before
    H = make()
    want = H @ torch.ones(H.n)
    with torch.no_grad():
        model.conv.bias.add_(0.0)  # so that kept graphs are built again
    fails[0], before = 1, {**switches(), **of_modules(model)}
    with pytest.raises(error):
        H @ torch.ones(H.n)
    assert {**switches(), **of_modules(model)} == before
    torch.testing.assert_close(H @ torch.ones(H.n), want)


def test_undo_steps_are_repeated_after_a_second_interrupt() -> None:
    """The second interrupt comes while the first change is being undone."""
    box, failing = {"a": 0, "b": 0, "c": 0}, [True]

    def put(name: str) -> None:
        if name == "b" and failing.pop():
            failing.append(False)
            raise KeyboardInterrupt
        box[name] = 0

    @scope
    def changed(undo: UndoLog) -> None:
        for name in box:
            undo(put, name)
            box[name] = 1

    @restored
    def call() -> None:
        with changed():
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        call()
    assert box == {"a": 0, "b": 0, "c": 0}


def test_a_failing_undo_step_does_not_stop_the_others() -> None:
    done: list[str] = []

    def change(undo: UndoLog) -> None:
        undo(done.append, "first")
        undo(int, "no number")
        undo(done.append, "last")

    with pytest.raises(ValueError, match="no number"), Scope(change):
        pass
    assert done == ["last", "first"]
