"""Gradients that are not the derivative of the loss are reported, or completed in eval mode."""

from __future__ import annotations

import copy
import functools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fasthessian as fh
from tests.support.detached import DETACHED, MODELS, Forces, made, small
from tests.support.models import EACH_ENGINE, columns, dense, error, refused

pytestmark = pytest.mark.slow

F32, F64 = torch.float32, torch.float64
FLAGS = "own modules have the flags of training"


@pytest.mark.parametrize("engine", EACH_ENGINE)
@pytest.mark.parametrize("name", MODELS)
def test_the_part_that_eval_mode_detaches_is_in_the_matrix(name: str, engine: str) -> None:
    want = dense(*made(name, always=True))
    model, *rest = made(name, always=False)
    held = [module.training for module in model.modules()]
    A = fh.Hessian(model, *rest, engine=engine)
    assert FLAGS in A.engine
    if engine == "forward" and name != "gate":  # torch.func allows no requires_grad_ inside
        with pytest.raises(RuntimeError, match="use engine='retained'"):
            columns(A)
        return
    assert error(columns(A), want) < (1e-6 if engine == "difference" else 1e-12)
    assert [module.training for module in model.modules()] == held
    B = fh.Hessian(made(name, always=True)[0], *rest, engine=engine)
    assert FLAGS not in B.engine and error(columns(B), want) < 1e-6
    assert A.loss() == B.loss()


@pytest.mark.parametrize("name", MODELS)
def test_the_check_passes_in_single_precision(name: str) -> None:
    want = dense(*made(name, always=True))
    A = fh.Hessian(*made(name, always=False, dtype=F32))
    assert error(columns(A), want) < 1e-4 and A.check().ok
    assert A.check().gradient <= 5e-3


def test_other_losses_of_forces_name_the_mode_that_works() -> None:
    """Forces alone have no graph in eval mode. Without retain_graph, energies lose their graph."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 3, dtype=F64), torch.randn(8, 3, dtype=F64)
    for options, data in (
        ({"energies": False}, (x, y)),
        ({"retain": None}, (x, torch.randn(8, 4, dtype=F64))),
    ):
        torch.manual_seed(0)
        model = Forces(**options).double()
        model.net[2].p = 0.0
        kind = ValueError if "energies" in options else RuntimeError
        refused(functools.partial(fh.Hessian, model, F.mse_loss, data), kind, "mode='train'")
        torch.manual_seed(0)
        exact = Forces(always=True, **options).double()
        A = fh.Hessian(model, F.mse_loss, data, mode="train")
        assert error(columns(A), dense(exact, F.mse_loss, data)) < 1e-12


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@pytest.mark.parametrize("loss", DETACHED)
def test_a_part_detached_on_purpose_is_accepted_and_named(loss: Any, dtype: torch.dtype) -> None:
    model, data = small(dtype)
    for curvature in (fh.Hessian, fh.GaussNewton):
        with pytest.warns(UserWarning, match="detaches a part of itself") as caught:
            A = curvature(model, loss, data)
        message = str(caught[0].message)
        assert len(caught) == 1 and "\n" not in message and len(message) < 300
        assert A.check().gradient > 0.05 and not A.check().ok
    params = list(model.parameters())
    with pytest.warns(UserWarning, match="derivative of closure"):
        B = fh.Hessian.from_closure(lambda: loss(model(data[0]), data[1]), params)
    H = columns(B)
    for i, want in enumerate(_differentiated_twice(model, loss, data)):
        torch.testing.assert_close(H[i], want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("curvature", [fh.Hessian, fh.GaussNewton, fh.EmpiricalFisher])
def test_the_warning_points_to_the_line_that_builds_the_operator(curvature: Any) -> None:
    model, data = small(F64)
    loss = next(iter(DETACHED))
    with pytest.warns(UserWarning, match="detaches a part of itself") as caught:
        curvature(model, loss, data)
    assert [each.filename for each in caught] == [__file__]
    with pytest.warns(UserWarning, match="derivative of closure") as caught:
        fh.Hessian.from_closure(lambda: loss(model(data[0]), data[1]), list(model.parameters()))
    assert [each.filename for each in caught] == [__file__]


def _differentiated_twice(model: nn.Module, loss: Any, data: Any) -> list[Tensor]:
    params = list(model.parameters())
    grads = torch.autograd.grad(loss(model(data[0]), data[1]), params, create_graph=True)
    flat = torch.cat([g.flatten() for g in grads])
    rows = [torch.autograd.grad(g, params, retain_graph=True, materialize_grads=True,
                                allow_unused=True) for g in flat]  # fmt: skip
    return [torch.cat([piece.flatten() for piece in row]) for row in rows]


def _relu(seed: int, dtype: torch.dtype, width: int, count: int) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    layers = [m for _ in range(3) for m in (nn.Linear(width, width), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(width, 3)).to(dtype)
    return model, (torch.randn(count, width, dtype=dtype), torch.randint(3, (count,)))


@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
def test_kinks_and_converged_models_give_no_warning(dtype: torch.dtype) -> None:
    """A kink may lie within every step. A gradient of 0 is below the rounding of the loss."""
    for seed in range(40):
        for width, count in ((3, 1), (8, 30)):
            model, data = _relu(seed, dtype, width, count)
            criterion = nn.CrossEntropyLoss(reduction="sum" if seed % 2 else "mean")
            assert not fh.Hessian(model, criterion, data).check().gradient > 5e-3
    model, x = nn.Linear(3, 1).to(dtype), torch.randn(20, 3, dtype=dtype)
    y = 100 + torch.randn(20, 1, dtype=dtype)
    with torch.no_grad():
        found = torch.linalg.lstsq(torch.cat([x, torch.ones_like(x[:, :1])], 1), y).solution
        model.weight.copy_(found[:3].T)
        model.bias.copy_(found[3])
    assert not fh.Hessian(model, nn.MSELoss(), (x, y)).check().gradient > 5e-3


def test_losses_with_jumps_or_infinite_values_give_no_warning() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 4, dtype=F64), torch.randn(6, 2, dtype=F64)

    class Routed(nn.Module):
        """Routes samples to the better of two experts, which may change within a step."""

        def __init__(self) -> None:
            super().__init__()
            self.gate, self.experts = nn.Linear(4, 2), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            gate = self.gate(1e-5 * x)
            rows = self.experts(x).unflatten(1, (2, 2))
            best = gate.argmax(1)
            return rows[torch.arange(len(x)), best] * gate.softmax(1).amax(1, keepdim=True)

    def ends(z: Tensor, y: Tensor) -> Tensor:
        return (z.square().sum() - z.detach().square().sum() + 1e-9).sqrt() + z.square().mean()

    for seed in range(20):
        torch.manual_seed(seed)
        assert not fh.Hessian(Routed().double(), nn.MSELoss(), (x, y)).check().gradient > 1e-3
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        w = torch.tensor([1.0, -2.0], dtype=F64, requires_grad=True)
        H = fh.Hessian.from_closure(lambda: (w * w.detach()).sum() * 0 + w.pow(2).sum(), [w])
    assert torch.equal(columns(H), 2 * torch.eye(2, dtype=F64))


def test_a_model_with_another_loss_in_training_mode_keeps_its_eval_mode() -> None:
    """Training mode would change the loss, so eval mode is restored, with a warning."""
    model = made("forces", always=False)[0]
    torch.manual_seed(0)

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(model)

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.inner(x), 0.5, self.training)

    data = torch.randn(8, 3, dtype=F64), torch.randn(8, 4, dtype=F64)
    noisy = Noisy()
    with pytest.warns(UserWarning, match="detaches a part of itself"):
        A = fh.Hessian(noisy, nn.MSELoss(), data)
    assert FLAGS not in A.engine and not A.check().ok
    assert A.loss() == nn.MSELoss()(noisy.eval()(data[0]), data[1]).item()


class Through(torch.autograd.Function):
    """Rounds in the forward pass; its backward is the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (4 * x).round() / 4

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return slope.clone()


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return -grad


def adversarial(z: Tensor, y: Tensor) -> Tensor:
    return z.square().mean() + (Reversed.apply(z) - y).square().mean()


@pytest.mark.parametrize(
    ("loss", "factor", "dtype"),
    [
        (lambda z, y: (Through.apply(z) - y).square().mean(), 1.0, F64),
        (adversarial, 2.0, F64),
        (adversarial, 2.0, F32),  # rounding is not tested in float32: jumps spoil differences
    ],
)
def test_a_gradient_that_custom_functions_make_is_reported_without_a_warning(
    loss: Any, factor: float, dtype: torch.dtype
) -> None:
    """The slopes are those of the backward passes, 1 and -1. (-1)^2 adds to the plain square."""
    torch.manual_seed(0)
    x, y = torch.randn(64, 4, dtype=dtype), torch.randn(64, 1, dtype=dtype)
    model = nn.Linear(4, 1).to(dtype)
    H = fh.Hessian(model, loss, (x, y))
    assert "which custom functions make, differs by" in H.engine
    assert not H.check().ok
    padded = torch.cat([x, torch.ones(64, 1, dtype=dtype)], 1)
    want = factor * 2 * padded.T @ padded / 64
    assert error(columns(H), want) < (1e-12 if dtype == F64 else 1e-5)
