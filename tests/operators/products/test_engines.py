"""The engines: passes over the data, memory, exact second derivatives, ambient modes."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fasthessian as fh
from fasthessian import kernels
from fasthessian.operators.base import multiply
from fasthessian.operators.request import Request
from fasthessian.vectors import empty_rows
from tests.support.models import ENGINES, PROBLEMS, columns, error

each_engine = pytest.mark.parametrize("engine", ENGINES)


class Counted(nn.Module):
    """Counts its forward passes."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.inner(x)


def _batches() -> tuple[Counted, nn.Module, list[tuple[Tensor, Tensor]], Tensor]:
    model, criterion, (x, y) = PROBLEMS["mlp"].make()
    exact = PROBLEMS["mlp"].dense(model, criterion, (x, y))
    cuts = ((0, 4), (4, 8), (8, 11))
    return Counted(model), criterion, [(x[a:b], y[a:b]) for a, b in cuts], exact


@pytest.mark.parametrize(("engine", "forwards"), [("recompute", 3), ("retained", 0)])
def test_a_block_makes_one_pass_over_the_data(engine: str, forwards: int) -> None:
    model, criterion, batches, exact = _batches()
    A = fh.Hessian(model, criterion, batches, engine=engine)
    A @ torch.ones(A.n, dtype=A.dtype)
    model.calls, A.matvecs = 0, 0
    assert error(columns(A), exact) < 1e-12
    assert model.calls == forwards
    assert A.matvecs == A.n


def test_auto_keeps_the_graphs_that_fit_the_budget() -> None:
    model, criterion, batches, exact = _batches()
    assert fh.Hessian(model, criterion, batches).engine.startswith("retained: ")
    whole = sum(_bytes(fh.Hessian(model, criterion, [batch])) for batch in batches)
    for budget, word, forwards in ((whole * 1.2, "retained", 0), (whole * 0.7, "retained", 1),
                                   (whole * 0.4, "retained", 2), (0, "recompute", 3)):  # fmt: skip
        A = fh.Hessian(model, criterion, batches, memory_budget=int(budget))
        assert A.engine.startswith(word) and "the budget of" in A.engine
        A @ torch.ones(A.n, dtype=A.dtype)
        model.calls = 0
        assert error(columns(A), exact) < 1e-12
        assert model.calls == forwards


def _bytes(A: fh.Hessian) -> float:
    number, unit = A.engine.split(": ")[1].split(" of graphs")[0].split()
    return float(number) * {"B": 1, "KiB": 1024, "MiB": 1024**2}[unit]


def test_the_measured_size_of_a_graph_is_a_few_times_that_of_the_activations() -> None:
    model = nn.Sequential(nn.Linear(4, 1000), nn.Tanh(), nn.Linear(1000, 1))
    x, y = torch.randn(100, 4), torch.randn(100, 1)
    held = _bytes(fh.Hessian(model, nn.MSELoss(), (x, y)))
    activation = 100 * 1000 * 4  # bytes of one hidden layer; a graph holds a few of them
    assert 2 * activation < held < 8 * activation
    double = _bytes(fh.Hessian(model, nn.MSELoss(), (x.repeat(2, 1), y.repeat(2, 1))))
    assert double == pytest.approx(2 * held, rel=0.05)


@pytest.mark.parametrize(("engine", "reads"), [("retained", 0), ("recompute", 2)])
def test_a_loader_whose_graphs_are_kept_is_not_read_again(engine: str, reads: int) -> None:
    model, criterion, batches, exact = _batches()

    class Loader:
        passes = 0

        def __iter__(self) -> Any:
            self.passes += 1
            return iter(batches)

    loader = Loader()
    A = fh.Hessian(model, criterion, loader, engine=engine)
    columns(A)
    loader.passes = 0
    assert error(columns(A), exact) < 1e-12 and error(columns(A), exact) < 1e-12
    assert loader.passes == reads


def test_the_graphs_of_a_loader_are_all_kept_or_none() -> None:
    model, criterion, batches, exact = _batches()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.ConcatDataset([torch.utils.data.TensorDataset(*b) for b in batches]), 4
    )
    whole = _bytes(fh.Hessian(model, criterion, loader))
    for budget, word in ((whole * 1.2, "retained"), (whole * 0.7, "recompute")):
        A = fh.Hessian(model, criterion, loader, memory_budget=int(budget))
        assert A.engine.startswith(word)
        assert error(columns(A), exact) < 1e-12


@each_engine
def test_the_same_product_twice_gives_the_same_bits(engine: str) -> None:
    model, criterion, data = PROBLEMS["cnn"].make(torch.float32)
    A = fh.Hessian(model, criterion, data, engine=engine)
    v = kernels.reference.normal_(torch.empty(A.n), 5)
    assert torch.equal(A @ v, A @ v)
    assert torch.equal(A @ v, fh.Hessian(model, criterion, data, engine=engine) @ v)


@each_engine
def test_graphs_are_freed_with_the_operator_without_the_cycle_collector(engine: str) -> None:
    inner, criterion, data = PROBLEMS["cnn"].make(torch.float32)
    held: list[weakref.ref[Tensor]] = []

    class Watched(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            out = self.inner(x)
            held.append(weakref.ref(out))  # the graph saves it, so it lives as long as the graph
            return out * out

    model = Watched()
    gc.collect()
    gc.disable()
    try:
        A = fh.Hessian(model, criterion, data, engine=engine)
        A @ torch.ones(A.n)
        A.loss()
        with pytest.raises(TypeError):
            A @ "v"
        assert sum(ref() is not None for ref in held) == (engine == "retained")
        del A
        assert not any(ref() is not None for ref in held)
    finally:
        gc.enable()


def test_second_derivatives_that_torch_would_drop_silently_are_an_error() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 2 * grad * ctx.saved_tensors[0]

    w = torch.ones(3, requires_grad=True)
    for loss in (lambda: Square.apply(w).sum(), lambda: Square.apply(w).square().sum()):
        with pytest.raises(RuntimeError, match="once_differentiable"):
            fh.Hessian.from_closure(loss, [w])

    def ctc() -> Tensor:
        logits = (w.view(3, 1, 1) * torch.arange(24.0).view(3, 2, 4)).log_softmax(-1)
        targets, lengths = torch.tensor([[1], [2]]), torch.tensor([3, 3])
        return F.ctc_loss(logits, targets, lengths, torch.tensor([1, 1]))

    with pytest.raises(RuntimeError, match="no second derivative in torch"):
        fh.Hessian.from_closure(ctc, [w]) @ torch.ones(3)


@each_engine
@pytest.mark.parametrize("name", ["mlp", "pinn", "transformer"])
def test_products_are_the_same_under_every_ambient_mode(name: str, engine: str) -> None:
    problem = PROBLEMS[name]
    made = problem.make(torch.float32)
    expected = columns(problem.operator(*made, engine=engine))
    outside = problem.operator(*made, engine=engine)
    modes = (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16))
    for mode in modes:
        with mode:
            data = None if made[2] is None else tuple(t.clone() for t in made[2])
            A = problem.operator(*made[:2], data, engine=engine)
            eye = torch.eye(A.n)
            out = empty_rows(A.n, A.n, A.dtype, A.device)
            multiply([Request(A, eye, out)])
            assert torch.equal(out, expected)
            assert torch.equal(A @ eye, expected)
            assert torch.equal(outside @ eye, expected)
            assert A.loss(eye[0]) == pytest.approx(outside.loss(eye[0]))
            assert not (A @ eye).is_inference()


def test_compiled_modules_are_run_eagerly() -> None:
    model, criterion, data = PROBLEMS["mlp"].make()
    exact = PROBLEMS["mlp"].dense(model, criterion, data)
    model[0].compile(backend="aot_eager")  # has no double backward
    assert error(columns(fh.Hessian(model, criterion, data)), exact) < 1e-12
    compiled = torch.compile(model, backend="aot_eager")
    assert error(columns(fh.Hessian(compiled, criterion, data)), exact) < 1e-12


def test_rebuilding_reports_a_graph_that_the_user_holds() -> None:
    """The nodes of that graph would bind a captured product to the stream they were created on."""
    model, criterion, data = PROBLEMS["mlp"].make()
    A = fh.Hessian(model, criterion, data)
    v = torch.ones(A.n, dtype=torch.float64)
    before = A @ v
    kept = A._kept.held()
    assert len(kept) == 1 and A._kept.rebuild() is not None  # this test still holds the graph
    del kept
    assert A._kept.rebuild() is None and A._kept.held() == ()
    loss = criterion(model(data[0]), data[1])
    assert "is still alive and uses '0.weight'" in A._kept.rebuild()
    del loss
    assert A._kept.rebuild() is None
    assert torch.equal(A @ v, before) and len(A._kept.held()) == 1


def test_buffers_are_copied_once_while_graphs_are_kept() -> None:
    model, criterion, data = PROBLEMS["cnn"].make()
    A = fh.Hessian(model, criterion, data)
    v = torch.ones(A.n, dtype=torch.float64)
    before = A @ v
    copies = dict(A._kept.copies)
    assert len(copies) == 6
    assert torch.equal(A @ v, before)
    assert all(A._kept.copies[key][1] is copy for key, (_, copy) in copies.items())
    model.norm1.running_mean.add_(0.5)
    changed = A @ v
    fresh = fh.Hessian(model, criterion, data) @ v
    assert torch.equal(changed, fresh) and not torch.equal(changed, before)
