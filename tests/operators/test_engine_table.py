"""Every engine gives the dense matrix of plain torch, for every problem and every curvature.

The bound for engines that differentiate exactly is 1e-10 in float64. A central difference with step
h has the error h^2 |H''| + eps |g| / h. At best, this is about eps^(2/3) times a constant of the
problem; eps^(2/3) is 4e-11 in float64 and 2e-5 in float32. The bounds 1e-6 and 1e-2 allow constants
of 3e4 and 4e2.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fasthessian as fh
from tests.support.models import (
    ALL_ENGINES,
    PROBLEMS,
    columns,
    error,
    gauss_newton,
    jacobian,
    mismatch,
    refused,
)

F32, F64 = torch.float32, torch.float64
NAMES = [name for name, problem in PROBLEMS.items() if not problem.closure]
each_engine = pytest.mark.parametrize("engine", ALL_ENGINES)


def bound(engine: str, dtype: torch.dtype) -> float:
    if dtype is F32:
        return 1e-2 if engine == "difference" else 1e-4
    return 1e-6 if engine == "difference" else 1e-10


@functools.cache
def exact(name: str) -> Tensor:
    return PROBLEMS[name].dense(*PROBLEMS[name].make())


def fisher(model: nn.Module, criterion: Any, data: Any) -> Tensor:
    """Mean of g g' over the valid targets of a cross-entropy; for other losses over samples."""
    y = data[-1]
    if isinstance(criterion, nn.CrossEntropyLoss):
        g = jacobian(model, data, lambda z: F.cross_entropy(z, y, reduction="none"))
        g = g[y.flatten() != criterion.ignore_index]
    else:  # the mean over the elements of a sample
        each = (
            F.mse_loss if isinstance(criterion, nn.MSELoss) else F.binary_cross_entropy_with_logits
        )
        g = jacobian(model, data, lambda z: each(z, y, reduction="none").flatten(1).mean(1))
    return g.T @ g / len(g)


@each_engine
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_the_hessian_is_the_dense_matrix(name: str, dtype: torch.dtype, engine: str) -> None:
    problem = PROBLEMS[name]
    if problem.closure and engine == "forward":
        return  # it is refused, see below
    A = problem.operator(*problem.make(dtype), engine=engine)
    assert A.dtype is dtype and A.engine.startswith("retained" if engine == "auto" else engine)
    assert mismatch(A, exact(name)) < bound(engine, dtype)
    if name == "mlp":
        H = columns(A)
        assert error(H, exact(name)) < bound(engine, dtype)
        assert error(H.T, exact(name)) < bound(engine, dtype)


@each_engine
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("curvature", "want"), [(fh.GaussNewton, gauss_newton), (fh.EmpiricalFisher, fisher)]
)
def test_first_order_curvatures_are_their_dense_matrices(
    curvature: Any, want: Any, name: str, engine: str
) -> None:
    made = PROBLEMS[name].make()
    G, exact = curvature(*made, engine=engine), want(*made)
    assert mismatch(G, exact) < bound(engine, F64)
    assert mismatch(curvature(*PROBLEMS[name].make(F32), engine=engine), exact) < bound(engine, F32)
    if name == "mlp":
        G = columns(G)
        assert torch.linalg.eigvalsh((G + G.T) / 2).min() > -bound(engine, F64) * G.abs().max()


CUTS = ((0, 4), (4, 5), (5, 11))  # the batch of one has no valid target
CRITERIA = {
    "mean": nn.CrossEntropyLoss(),
    "sum": nn.CrossEntropyLoss(reduction="sum"),
    "ignore 1": nn.CrossEntropyLoss(ignore_index=1),
    "own": lambda z, y: (z.square().sum(1) * (1 + y)).mean(),
}


@each_engine
@pytest.mark.parametrize("how", CRITERIA)
def test_ragged_batches_and_loaders_give_the_matrix_of_the_whole(how: str, engine: str) -> None:
    problem, criterion = PROBLEMS["mlp"], CRITERIA[how]
    model, _, (x, y) = problem.make()
    if how != "own":
        y[4] = getattr(criterion, "ignore_index", -100)
        y[[0, 7, 9]] = -100 if how != "ignore 1" else 1
    want = problem.dense(model, criterion, (x, y))
    loss = float(criterion(model(x), y).detach())
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    for data in ([(x[a:b], y[a:b]) for a, b in CUTS], loader):
        A = fh.Hessian(model, criterion, data, engine=engine)
        assert mismatch(A, want) < bound(engine, F64)
        assert A.loss() == pytest.approx(loss, rel=1e-12)
        G = fh.GaussNewton(model, criterion, data, engine=engine)
        assert mismatch(G, gauss_newton(model, criterion, (x, y))) < bound(engine, F64)


LOSSES = {
    "mse": nn.MSELoss(),
    "mse, sum": nn.MSELoss(reduction="sum"),
    "huber": nn.HuberLoss(delta=0.3),
    "smooth l1": nn.SmoothL1Loss(beta=0.3),
    "bce": nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 3.0], dtype=F64)),
    "poisson": nn.PoissonNLLLoss(),
    "kl": nn.KLDivLoss(reduction="batchmean"),
    "soft margin": nn.SoftMarginLoss(),
    "probabilities": nn.CrossEntropyLoss(label_smoothing=0.1),
    "own": lambda z, y: (z - y).square().mean(),
}


@each_engine
@pytest.mark.parametrize("how", LOSSES)
def test_the_losses_of_torch_on_real_targets(how: str, engine: str) -> None:
    problem, criterion = PROBLEMS["mlp"], LOSSES[how]
    model, _, (x, _) = problem.make()
    y = torch.rand(11, 3, dtype=F64, generator=torch.Generator().manual_seed(1))
    for curvature, want in ((fh.Hessian, problem.dense), (fh.GaussNewton, gauss_newton)):
        if how in ("huber", "soft margin") and engine == "forward":
            continue  # torch has no forward derivative of these, see below
        if how == "kl" and curvature is fh.GaussNewton:
            continue  # the loss is linear in the outputs
        A = curvature(model, criterion, (x, y), engine=engine)
        assert mismatch(A, want(model, criterion, (x, y))) < 10 * bound(engine, F64)


@each_engine
def test_chosen_parameters_zero_and_scaled_vectors_and_changed_parameters(engine: str) -> None:
    model, criterion, data = PROBLEMS["mlp"].make()
    A = fh.Hessian(model, criterion, data, engine=engine, params=["2.weight", "0.bias"])
    names = ["0.bias", "2.weight"]  # of 0.weight (30), 0.bias (6), 2.weight (18), 2.bias (3)
    assert sorted(A.unflatten(torch.zeros(A.n, dtype=F64))) == names and A.n == 24
    for scale in (1.0, 1.3):
        with torch.no_grad():
            model[0].weight.mul_(scale)
        H = PROBLEMS["mlp"].dense(model, criterion, data)[30:54, 30:54]
        order = [0, 1] if list(A.unflatten(torch.zeros(24, dtype=F64))) == names else [1, 0]
        at = torch.cat([(torch.arange(6), torch.arange(6, 24))[i] for i in order])
        want = H[at][:, at]
        assert mismatch(A, want) < bound(engine, F64)
        v = torch.linspace(-1, 1, 24, dtype=F64)
        assert (A @ v - want @ v).norm() < bound(engine, F64) * (want @ v).norm()
        assert not (A @ (0 * v)).any()
        small = A @ (1e-12 * v)  # steps do not depend on the size of v
        assert (1e12 * small - want @ v).norm() < bound(engine, F64) * (want @ v).norm()
        large = A @ (1e12 * v)
        assert (1e-12 * large - want @ v).norm() < bound(engine, F64) * (want @ v).norm()


@each_engine
def test_the_model_is_unchanged(engine: str) -> None:
    model, criterion, data = PROBLEMS["cnn"].make()
    model.train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    for curvature in (fh.Hessian, fh.GaussNewton, fh.EmpiricalFisher, fh.Fisher):
        A = curvature(model, criterion, data, engine=engine)
        assert torch.equal(A @ torch.ones(A.n, dtype=F64), A @ torch.ones(A.n, dtype=F64))
        assert model.training and all(p.grad is None for p in model.parameters())
        assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
        assert torch.equal(random, torch.get_rng_state())


def test_unsupported_engines_are_refused_in_one_line() -> None:
    w = torch.ones(3, requires_grad=True)
    refused(
        lambda: fh.Hessian.from_closure(lambda: w.pow(3).sum(), [w], engine="forward"),
        ValueError, "engine",
    )  # fmt: skip
    made = PROBLEMS["mlp"].make()
    for curvature in (fh.Hessian, fh.GaussNewton, fh.EmpiricalFisher, fh.Fisher):
        refused(lambda c=curvature: c(*made, engine="reverse"), ValueError, "engine must be one of")


def test_losses_without_forward_derivatives_are_refused_in_one_line() -> None:
    model, _, (x, _) = PROBLEMS["mlp"].make()
    y = torch.rand(11, 3, dtype=F64)
    lstm = nn.LSTM(5, 3)  # in float32, a library computes it

    def last(z: Any, y: Tensor) -> Tensor:
        return (z[0] * y).square().mean()

    for made in ((model, LOSSES["huber"], (x, y)), (model, LOSSES["soft margin"], (x, y)),
                 (lstm, last, (x.float(), y.float()))):  # fmt: skip

        def product(made: Any = made) -> Tensor:
            A = fh.Hessian(*made, engine="forward")
            return A @ torch.ones(A.n, dtype=A.dtype)

        refused(product, RuntimeError, "engine=")


class Cube(torch.autograd.Function):
    """x^3, with a derivative that torch cannot differentiate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * grad * ctx.saved_tensors[0] ** 2


class Cubic(nn.Module):
    def __init__(self, cube: Any) -> None:
        super().__init__()
        self.first, self.last, self.cube = nn.Linear(5, 4), nn.Linear(4, 3), cube

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.cube(self.first(x)))


@pytest.mark.parametrize("engine", ["retained", "recompute", "auto"])
def test_an_operation_without_second_derivative_names_an_engine_that_works(engine: str) -> None:
    _, criterion, data = PROBLEMS["mlp"].make()
    torch.manual_seed(0)
    model = Cubic(Cube.apply).double()

    def product() -> Tensor:
        A = fh.Hessian(model, criterion, data, engine=engine)
        return A @ torch.ones(A.n, dtype=F64)

    with pytest.raises(RuntimeError, match="engine='difference'") as caught:
        product()
    assert "\n" not in str(caught.value)
    plain = Cubic(lambda x: x**3).double()
    plain.load_state_dict(model.state_dict())
    want = PROBLEMS["mlp"].dense(plain, criterion, data)
    served = fh.Hessian(model, criterion, data, engine="difference")
    assert mismatch(served, want) < bound("difference", F64)
