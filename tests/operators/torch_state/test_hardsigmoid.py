"""Hardsigmoid and hardswish have exact second derivatives under each of their names."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fasthessian as fh
from fasthessian.operators.torch_state.patches import Patches
from tests.support.models import columns, dense, error, gauss_newton

pytestmark = pytest.mark.slow

F64 = torch.float64
aten = torch.ops.aten


class ByRelu6(nn.Module):
    """Hardsigmoid or hardswish, made of functions that torch differentiates twice."""

    def __init__(self, swish):
        super().__init__()
        self.swish = swish

    def forward(self, x):
        y = F.relu6(x + 3) / 6
        return x * y if self.swish else y


class Called(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


# name: (function, whether it is hardswish)
CALLS = {
    "F.hardsigmoid": (F.hardsigmoid, False),
    "F.hardsigmoid, in place": (lambda x: F.hardsigmoid(x, inplace=True), False),
    "nn.Hardsigmoid": (nn.Hardsigmoid(), False),
    "nn.Hardsigmoid, in place": (nn.Hardsigmoid(inplace=True), False),
    "aten.hardsigmoid": (aten.hardsigmoid, False),
    "aten.hardsigmoid.default": (aten.hardsigmoid.default, False),
    "aten.hardsigmoid_": (aten.hardsigmoid_, False),
    "aten.hardsigmoid_.default": (aten.hardsigmoid_.default, False),
    "torch._C._nn.hardsigmoid": (lambda x: torch._C._nn.hardsigmoid(x), False),
    "F.hardswish": (F.hardswish, True),
    "F.hardswish, in place": (lambda x: F.hardswish(x, inplace=True), True),
    "nn.Hardswish": (nn.Hardswish(), True),
    "nn.Hardswish, in place": (nn.Hardswish(inplace=True), True),
    "aten.hardswish.default": (aten.hardswish.default, True),
}


class Excited(nn.Module):
    """Squeeze and excitation between convolutions, as in MobileNetV3."""

    def __init__(self, gate):
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)
        self.squeeze, self.gate, self.head = nn.Conv2d(3, 3, 1), gate, nn.Linear(3, 3)

    def forward(self, x):
        x = self.norm(self.first(x))
        x = x * self.gate(5 * self.squeeze(x.mean((2, 3), keepdim=True)))
        return self.head(torch.tanh(x).mean((2, 3)))


def problem(gate):
    torch.manual_seed(0)
    model = Excited(gate).double().eval()
    return model, nn.CrossEntropyLoss(), (torch.randn(6, 2, 7, 7, dtype=F64), torch.arange(6) % 3)


@functools.lru_cache
def by_relu6(swish):
    return dense(*problem(ByRelu6(swish)))


@pytest.mark.parametrize("name", CALLS)
def test_the_dense_hessian_by_each_name(name):
    function, swish = CALLS[name]
    made, exact = problem(Called(function)), by_relu6(swish)
    for engine in ("retained", "recompute", "forward"):
        assert error(columns(fh.Hessian(*made, engine=engine)), exact) < 1e-12, engine


@pytest.mark.parametrize("name", ["nn.Hardsigmoid", "nn.Hardswish"])
def test_gauss_newton_by_each_engine(name):
    function, swish = CALLS[name]
    exact = gauss_newton(*problem(ByRelu6(swish)))
    for engine in ("retained", "forward"):
        G = fh.GaussNewton(*problem(Called(function)), engine=engine)
        assert error(columns(G), exact) < 1e-12, engine


def test_curvature_across_the_kinks_is_that_of_a_closure_too():
    x = torch.linspace(-4, 4, 33, dtype=F64).requires_grad_()
    H = columns(fh.Hessian.from_closure(lambda: F.hardsigmoid(x).square().sum(), [x]))
    inside = ((x > -3) & (x < 3)).to(F64)
    assert torch.allclose(H, torch.diag(inside / 18), rtol=0, atol=1e-15)
    H = columns(fh.Hessian.from_closure(lambda: F.hardswish(x).sum(), [x]))
    assert torch.allclose(H, torch.diag(inside / 3), rtol=0, atol=1e-15)


def slope(function, x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


def points(dtype):
    """The kinks, the floating-point numbers next to them, and a grid."""
    kinks = [torch.tensor(at, dtype=dtype) for at in (-3.0, 0.0, 3.0)]
    near = [torch.nextafter(k, k + side) for k in kinks for side in (-1, 1)]
    special = torch.tensor([torch.inf, -torch.inf, torch.nan], dtype=dtype)
    return torch.cat([torch.stack(kinks + near), torch.linspace(-4, 4, 4001, dtype=dtype), special])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64], ids=str)
def test_values_have_torchs_bits_and_slopes_torchs_kinks(dtype):
    x = points(dtype)
    for function in (F.hardsigmoid, F.hardswish, CALLS["aten.hardsigmoid_"][0]):
        with torch.no_grad():
            value = function(x.clone())
        plain = slope(lambda x, f=function: f(x * 1), x)
        with Patches():
            y = function((x.clone().requires_grad_()) * 1)
            rewritten = slope(lambda x, f=function: f(x * 1), x)
        assert y.requires_grad and y.dtype is dtype
        assert torch.equal(y.detach().nan_to_num(7), value.nan_to_num(7))
        # torch's slope in float64 is 1/6 in float32
        gap = (rewritten - plain)[~x.isnan()].abs().max()
        assert gap <= (1e-8 if dtype is F64 else 0)
        assert torch.equal((rewritten == 0)[~x.isnan()], (plain == 0)[~x.isnan()])


def test_torchs_own_functions_are_back_after_a_product():
    names = [(torch._C._nn, "hardsigmoid"), (torch._C._nn, "hardsigmoid_")]
    names += [(p, "_op") for p in (aten.hardsigmoid, aten.hardsigmoid.default, aten.hardsigmoid_)]
    before = [getattr(place, name) for place, name in names]
    H = fh.Hessian(*problem(nn.Hardsigmoid()))
    H @ torch.ones(H.n, dtype=F64)
    assert all(
        getattr(place, name) is own for (place, name), own in zip(names, before, strict=True)
    )
    x, out = torch.ones(3), torch.empty(3)
    with Patches():
        assert torch._C._nn.hardsigmoid(x, out=out) is out
        assert F.hardsigmoid(x, inplace=True) is x and torch.equal(x, out)
