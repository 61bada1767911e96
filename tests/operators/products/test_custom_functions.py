"""Custom autograd functions with a wrong second derivative have the matrices of plain torch.

The error of local central differences is about eps^(2/3), relative to third derivatives. This is
4e-11 in float64. For narrower dtypes, differences use the next wider dtype, so the error is below
rounding. The bound 1e-6 allows the same factor as test_engine_table.py. `Adjoint` reads its module
in float32, where the error is about 2e-5 times the same factor of 1e2.
"""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import _SingleLevelFunction

import fasthessian as fh
from tests.support.custom_models import BF16, F32, F64, PLANTED, Net, cube, dense, planted, twins
from tests.support.custom_wrong import Adjoint, NoGrad, Rounded
from tests.support.models import columns, error, gauss_newton, jacobian, poisson_residual, refused

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("engine", ["retained", "recompute"])
@pytest.mark.parametrize("name", PLANTED)
def test_the_hessian_is_that_of_plain_operations(name: str, engine: str) -> None:
    made, twin, data = planted(name, F64)
    H = fh.Hessian(*made, engine=engine)
    assert error(columns(H), dense(*twin, data)) < 1e-6
    assert "by central differences" in H.engine and H._capture_obstacle()
    assert H.check().ok


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", PLANTED)
def test_narrow_dtypes_have_the_error_of_plain_operations(name: str, dtype: torch.dtype) -> None:
    if dtype is BF16 and name in ("outside of torch", "an adjoint that reads a module"):
        return  # NumPy has no bfloat16; a test below covers the other function
    made, twin, data = planted(name, F64)
    want = dense(*twin, data)
    made, twin, data = planted(name, dtype)
    H = fh.Hessian(*made)
    plain = error(columns(fh.Hessian(*twin, data)), want)
    own = 1e-2 if made[0].__class__.__name__ == "Flow" else 1e-6
    assert error(columns(H), want) < 2 * plain + own
    assert "by central differences" in H.engine


@pytest.mark.parametrize("engine", ["auto", "difference"])
@pytest.mark.parametrize("name", PLANTED)
def test_the_gauss_newton_matrix_is_that_of_plain_operations(name: str, engine: str) -> None:
    made, twin, data = planted(name, F64)
    if made[1] is None:
        return  # the model returns only its loss
    G = fh.GaussNewton(*made, engine=engine)
    assert error(columns(G), gauss_newton(*twin, data)) < 1e-6


def test_the_fisher_matrices_are_those_of_plain_operations() -> None:
    model, plain, data = twins(NoGrad.apply, cube)
    g = jacobian(plain, data, lambda z: F.cross_entropy(z, data[1], reduction="none"))
    made = fh.EmpiricalFisher(model, F.cross_entropy, data)
    assert error(columns(made), g.T @ g / 9) < 1e-6
    one, two = (fh.Fisher(m, F.cross_entropy, data, seed=3) for m in (model, plain))
    assert error(columns(one), columns(two)) < 1e-6


def test_a_straight_through_estimate_without_graph_passes_curvature_through() -> None:
    model, plain, data = twins(
        lambda x: Rounded.apply(x) ** 3, lambda x: (x + (x.round() - x).detach()) ** 3
    )
    assert error(columns(fh.Hessian(model, F.cross_entropy, data)), dense(
        plain, F.cross_entropy, data)) < 1e-12  # fmt: skip


class Twice(torch.autograd.Function):
    """x^3, for two arguments that are the same tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(x, z)
        return x**2 * z

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, z = (t.detach() for t in ctx.saved_tensors)
        return 2 * g * x * z, g * x**2


def test_a_parameter_passed_twice_to_a_function() -> None:
    w = torch.tensor([1.0, 2.0], dtype=F64, requires_grad=True)
    for f in (lambda: Twice.apply(w, w).sum(), lambda: Twice.apply(w * 1, w).sum()):
        H = columns(fh.Hessian.from_closure(f, [w]))
        assert error(H, torch.diag(6 * w.detach())) < 1e-8
    assert w.grad is None and w.tolist() == [1, 2]


def test_products_use_changed_parameters_and_graphs_are_freed() -> None:
    model, plain, data = twins(NoGrad.apply, cube)
    H = fh.Hessian(model, F.cross_entropy, data)
    with torch.no_grad():
        model.first.weight.mul_(1.3)
        plain.first.weight.mul_(1.3)
    assert error(columns(H), dense(plain, F.cross_entropy, data)) < 1e-6
    v = torch.ones(H.n, dtype=F64)
    assert torch.equal(H @ v, H @ v)
    H._kept.rebuild()
    held: list[Any] = []

    def noted(x: Tensor) -> Tensor:
        y = NoGrad.apply(x)
        held.append(weakref.ref(y.grad_fn))
        return y * y

    model.f = noted
    H = fh.Hessian(model, F.cross_entropy, data)
    gc.collect()
    gc.disable()
    try:
        H @ v
        assert sum(ref() is not None for ref in held) == 1
        del H
        assert not any(ref() is not None for ref in held)
    finally:
        gc.enable()


def test_torch_is_unchanged() -> None:
    before = dict(vars(_SingleLevelFunction))
    model, _, data = twins(NoGrad.apply, cube)
    A, B = (fh.Hessian(model, F.cross_entropy, data) for _ in range(2))
    with A._evaluation.conditions(), B._evaluation.conditions():
        assert "apply" in vars(_SingleLevelFunction)
    with pytest.raises(ZeroDivisionError), A._evaluation.conditions():
        raise ZeroDivisionError
    assert dict(vars(_SingleLevelFunction)) == before
    x = torch.ones(2, requires_grad=True)
    assert NoGrad.apply(x).grad_fn.name() == "NoGradBackward"


def test_functions_of_later_batches_are_checked() -> None:
    class Late(Net):
        def forward(self, x: Tensor) -> Tensor:
            self_f = self.f if len(x) < 5 else torch.tanh
            return self.last(self_f(self.first(x)))

    torch.manual_seed(0)
    model, plain = Late(NoGrad.apply).double(), Late(cube).double()
    plain.load_state_dict(model.state_dict())
    x, y = torch.randn(9, 3, dtype=F64), torch.randint(3, (9,))
    batches = [(x[:5], y[:5]), (x[5:], y[5:])]
    parts = [len(b[1]) / 9 * dense(plain, F.cross_entropy, b) for b in batches]
    for engine in ("retained", "recompute"):
        H = fh.Hessian(model, F.cross_entropy, batches, engine=engine)
        assert error(columns(H), parts[0] + parts[1]) < 1e-6


class InPlace(torch.autograd.Function):
    """x^3 in place, with a detached derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.clone()
        ctx.mark_dirty(x)
        return x.pow_(3)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 3 * ctx.x**2


class Noisy(torch.autograd.Function):
    """A random multiple of x^3, with a detached derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x, ctx.factor = x.detach(), torch.rand_like(x)
        return ctx.factor * x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 3 * ctx.factor * ctx.x**2


@pytest.mark.parametrize(
    ("f", "plain"), [(InPlace, cube), (Noisy, lambda x: torch.rand_like(x) * x**3)]
)
def test_unreplaceable_functions_are_refused_and_the_advice_works(f: Any, plain: Any) -> None:
    model, twin, data = twins(lambda x: f.apply(x * 1), plain)
    for curvature in (fh.Hessian, fh.GaussNewton):
        refused(
            lambda c=curvature: c(model, F.cross_entropy, data),
            RuntimeError, f"second derivative of {f.__name__} .*engine='difference' with Hessian",
        )  # fmt: skip
    H = fh.Hessian(model, F.cross_entropy, data, engine="difference")
    assert error(columns(H), columns(fh.Hessian(twin, F.cross_entropy, data))) < 1e-6


def test_third_derivatives_of_a_replaced_function_are_refused() -> None:
    """The loss differentiates the network by its input, so H needs third derivatives."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    params = dict(model.named_parameters())

    class Cubed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return NoGrad.apply(model(x))

        def parameters(self) -> Any:
            return model.parameters()

    with pytest.raises(RuntimeError, match="once_differentiable"):
        fh.Hessian.from_closure(lambda: poisson_residual(Cubed()), params)


class Squares(torch.autograd.Function):
    """(x W)^2 by a matrix product, in bfloat16 under autocast, with a detached derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor) -> Tensor:
        y = x @ W
        ctx.save_for_backward(x, W, y)
        return y * y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, W, y = (t.detach() for t in ctx.saved_tensors)
        g = (2 * g * y).to(x.dtype)
        return g @ W.t(), x.t() @ g


def test_a_function_runs_again_under_the_autocast_of_the_user() -> None:
    found: list[torch.dtype] = []

    def lower(f: Any) -> Any:
        def run(x: Tensor, s: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                y = f(x, torch.diag(s))
            found.append(y.dtype)
            return y.float()

        return run

    torch.manual_seed(0)
    one = Net(lower(Squares.apply), scaled=True)
    two = Net(lower(lambda x, W: (x @ W).square()), scaled=True)
    two.load_state_dict(one.state_dict())
    data = torch.randn(9, 3), torch.randint(3, (9,))
    H, plain = (columns(fh.Hessian(m, F.cross_entropy, data)) for m in (one, two))
    assert error(H, plain.double()) < 2e-2 and set(found) == {BF16}


def test_an_adjoint_in_bfloat16_states_its_error_or_is_refused() -> None:
    made, _, _ = planted("an adjoint that reads a module", BF16)
    refused(lambda: fh.Hessian(*made), RuntimeError, f"second derivative of {Adjoint.__name__} in")
    H = fh.Hessian(*made, engine="difference")
    assert bool((H @ torch.ones(H.n)).isfinite().all())
