"""Operators in several threads: products run one after another, and global state is restored."""

from __future__ import annotations

import multiprocessing
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

import fasthessian as fh
from tests.support.models import ENGINES, F64, columns, dense, error

pytestmark = pytest.mark.slow

N = 42  # parameters of Net
WAIT = 60.0  # seconds until a test that hangs fails
each_engine = pytest.mark.parametrize("engine", ENGINES)


def together(*jobs: Callable[[], Any]) -> list[BaseException]:
    """Run each job in its own thread; return what they raised."""
    errors: list[BaseException] = []

    def run(job: Callable[[], Any]) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(job,), daemon=True) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert not any(thread.is_alive() for thread in threads), "a thread waits for ever"
    return errors


class Meeting:
    """Counts how many threads are inside at once; each waits a moment for another one."""

    def __init__(self) -> None:
        self.inside, self.most = 0, 0
        self.changed = threading.Condition()

    def visit(self) -> None:
        with self.changed:
            self.inside += 1
            self.most = max(self.most, self.inside)
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.most > 1, timeout=0.05)
        with self.changed:
            self.inside -= 1


class Net(nn.Module):
    """A network with batch normalisation and dropout, whose forward pass visits a meeting."""

    def __init__(self, meeting: Meeting | None) -> None:
        super().__init__()
        self.a, self.norm, self.drop = nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5)
        self.b, self.meeting = nn.Linear(5, 2), meeting
        nn.init.normal_(self.norm.running_mean, std=0.3)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        if self.meeting is not None:
            self.meeting.visit()
        return self.b(self.drop(torch.tanh(self.norm(self.a(x)))))


def problem(meeting: Meeting | None = None) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(0)
    x, y = torch.randn(6, 3, dtype=F64), torch.randint(2, (6,))
    return Net(meeting).double().train(), nn.CrossEntropyLoss(), (x, y)


PASSES: dict[str, Callable[[fh.Hessian], Any]] = {
    "products": lambda A: A @ torch.ones(2, A.n, dtype=F64),
    "gradients": lambda A: A.gradient(),
    "losses": lambda A: A.loss(torch.ones(A.n, dtype=F64)),
    "coupling": lambda A: A._evaluation.coupling()[:2],
    "blocks": lambda A: A.blocks("layer")["a"] @ torch.ones(20, dtype=F64),
}


@pytest.mark.parametrize("other", PASSES)
def test_calls_of_two_operators_run_one_after_another(other: str) -> None:
    meeting = Meeting()
    model, criterion, data = problem(meeting)
    buffers, states = list(model.buffers()), (torch.get_rng_state(), random.getstate())
    numpy_state = np.random.get_state()[1].copy()
    A, B = (fh.Hessian(model, criterion, data, engine="recompute") for _ in range(2))
    want, result = PASSES["products"](A), PASSES[other](B)
    found: dict[str, Any] = {}
    for _ in range(3):
        errors = together(
            lambda: found.update(A=PASSES["products"](A)),
            lambda: found.update(B=PASSES[other](B)),
        )
        assert not errors
        assert torch.equal(found["A"], want)
        assert torch.equal(torch.as_tensor(found["B"]), torch.as_tensor(result))
    assert meeting.most == 1
    assert all(module.training for module in model.modules())
    assert all(a is b for a, b in zip(model.buffers(), buffers, strict=True))
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_operators_are_constructed_one_after_another() -> None:
    meeting = Meeting()
    given = [problem(meeting) for _ in range(2)]
    states = torch.get_rng_state()
    built: list[Any] = []
    kinds = (fh.Hessian, fh.GaussNewton)
    jobs = [lambda k=k, g=g: built.append(k(*g)) for k, g in zip(kinds, given, strict=True)]
    assert not together(*jobs)
    assert meeting.most == 1 and len(built) == 2
    assert torch.equal(torch.get_rng_state(), states)


@each_engine
def test_one_operator_serves_runs_of_two_threads(engine: str) -> None:
    model, criterion, data = problem()
    exact = dense(model, criterion, data)
    A = fh.Hessian(model, criterion, data, engine=engine)
    want = torch.linalg.eigvalsh(exact).flip(0)[:3]
    found: list[Any] = []
    jobs = [lambda: found.append(fh.eigsh(A, 3, "LA", tol=1e-8).values)] * 3
    jobs += [lambda: found.append(fh.eigsh(A.blocks("layer"), 2, tol=1e-8))]
    assert not together(*jobs)
    for values in found:
        if isinstance(values, Tensor):
            assert torch.allclose(values, want, rtol=1e-6)
    assert error(columns(A), exact) < 1e-12


@pytest.mark.parametrize("raised", [KeyboardInterrupt, ValueError])
def test_an_interrupted_product_lets_the_next_thread_continue(raised: type[BaseException]) -> None:
    model, criterion, data = problem()
    A = fh.Hessian(model, criterion, data, engine="recompute")
    v = torch.ones(A.n, dtype=F64)
    want = A @ v

    def stop(module: nn.Module, args: Any) -> None:
        raise raised("stop")

    hook = model.b.register_forward_pre_hook(stop)
    with pytest.raises(raised, match="stop"):
        A @ v
    hook.remove()
    found: list[Tensor] = []
    assert not together(lambda: found.append(A @ v))
    assert torch.equal(found[0], want)


class Checkpointed(nn.Module):
    """A layer that runs again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(checkpoint(lambda h: torch.tanh(self.a(h)), x, use_reentrant=False))


@each_engine
def test_checkpointed_layers_do_not_deadlock(engine: str) -> None:
    _, criterion, data = problem()
    models = [Checkpointed().double() for _ in range(2)]
    operators = [fh.Hessian(m, criterion, data, engine=engine) for m in models]
    found: dict[int, Tensor] = {}
    jobs = [lambda i=i: found.update({i: columns(operators[i])}) for i in range(2)]
    assert not together(*jobs)
    for i, model in enumerate(models):
        assert error(found[i], dense(model, criterion, data)) < 1e-12


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 and later
def test_workers_of_a_loader_in_one_thread_and_products_in_another() -> None:
    model, criterion, data = problem()
    loader = DataLoader(TensorDataset(*data), 3, num_workers=1, multiprocessing_context="fork")
    v = torch.ones(N, dtype=F64)
    want = fh.Hessian(model, criterion, data) @ v
    found: list[Tensor] = []

    def loaded() -> None:
        found.append(fh.Hessian(model, criterion, loader, engine="recompute") @ v)

    def in_memory() -> None:
        A = fh.Hessian(model, criterion, data, engine="recompute")
        found.extend(A @ v for _ in range(50))

    assert not together(loaded, in_memory)
    assert len(found) == 51
    for each in found:
        assert torch.allclose(each, want, rtol=1e-12)


def _product(model: nn.Module, criterion: Any, data: Any, pipe: Any) -> None:
    v = torch.ones(N, dtype=F64)
    pipe.send((fh.Hessian(model, criterion, data) @ v).tolist())


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # Python 3.12 and later
def test_a_process_forked_during_a_product_of_another_thread_can_compute() -> None:
    model, criterion, data = problem()
    slow, *_ = problem()
    want = fh.Hessian(model, criterion, data) @ torch.ones(N, dtype=F64)
    A = fh.Hessian(slow, criterion, data, engine="recompute")
    entered, leave = threading.Event(), threading.Event()

    def linger(module: nn.Module, args: Any) -> None:
        entered.set()
        leave.wait(WAIT)

    slow.b.register_forward_pre_hook(linger)
    thread = threading.Thread(target=lambda: A @ torch.ones(N, dtype=F64), daemon=True)
    thread.start()
    assert entered.wait(WAIT)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    child = context.Process(target=_product, args=(model, criterion, data, there))
    try:
        child.start()
        assert here.poll(20), "the child waits for a thread that it does not have"
        assert torch.equal(torch.tensor(here.recv(), dtype=F64), want)
    finally:
        child.kill()
        leave.set()
        thread.join(WAIT)


@each_engine
@pytest.mark.filterwarnings("ignore::fasthessian.ConvergenceWarning")
def test_a_thread_that_trains_the_model_stops_the_analysis(engine: str) -> None:
    model, criterion, data = problem()
    A = fh.Hessian(model, criterion, data, engine=engine)
    begun, stepped = threading.Event(), threading.Event()

    def train() -> None:
        begun.wait(WAIT)
        with torch.no_grad():
            model.b.bias.add_(0.1)
        stepped.set()

    def tell(done: int, total: int | None) -> None:
        begun.set()
        stepped.wait(WAIT)

    def analyse() -> None:
        with pytest.raises(RuntimeError, match=r"parameter 'b\.bias' changed during the run"):
            fh.trace(A, rtol=1e-6, max_matvecs=40, progress=tell)

    assert not together(train, analyse)
    assert error(columns(A), dense(model, criterion, data)) < 1e-12


def test_a_callback_may_wait_for_products_of_another_thread() -> None:
    model, criterion, data = problem()
    A = fh.Hessian(model, criterion, data)
    made: list[Tensor] = []

    def tell(done: int, total: int | None) -> None:
        assert not together(lambda: made.append(A @ torch.ones(A.n, dtype=F64)))

    fh.density(A, steps=4, progress=tell)
    assert made
