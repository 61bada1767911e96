"""Layers called with unusual dtypes and arguments: replaced functions do what torch's do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import fasthessian as fh
from fasthessian.operators.torch_state.patches import Patches
from tests.support.models import EACH_ENGINE, columns, dense, error

pytestmark = pytest.mark.slow

F64, C128 = torch.float64, torch.complex128
CONVOLUTIONS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {  # looked up when called
    "conv1d": ("conv1d", (2, 2, 3), {"stride": 2, "padding": (1,)}),
    "conv2d": ("conv2d", (2, 2, 3, 3), {"padding": 1}),
    "conv2d, dilated": ("conv2d", (2, 2, 2, 2), {"dilation": (1, 2)}),
    "conv2d, same": ("conv2d", (2, 2, 3, 1), {"padding": "same"}),
    "conv2d, groups": ("conv2d", (2, 1, 2, 2), {"groups": 2}),
    "conv3d": ("conv3d", (2, 2, 2, 1, 2), {}),
    "conv_transpose2d": ("conv_transpose2d", (2, 2, 2, 2), {"stride": 2}),
}


class ComplexNet(nn.Module):
    """A complex convolution, whose weight is made of two real parameters."""

    def __init__(self, name: str, bias: bool) -> None:
        super().__init__()
        self.function, shape, self.options = CONVOLUTIONS[name]
        self.real, self.imag = (nn.Parameter(torch.randn(shape, dtype=F64)) for _ in range(2))
        self.bias = nn.Parameter(torch.randn(2, dtype=F64)) if bias else None
        self.norm = nn.BatchNorm1d(2).double()
        nn.init.uniform_(self.norm.running_var, 0.5, 2)
        self.head = nn.Linear(2, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.complex(self.real, self.imag)
        bias = None if self.bias is None else torch.complex(self.bias, self.bias.sin())
        y = getattr(F, self.function)(torch.complex(x, x.cos()), weight, bias, **self.options)
        return self.head(self.norm(y.abs().tanh().flatten(2).mean(2)))


@pytest.mark.parametrize("engine", EACH_ENGINE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_complex_convolution_gives_the_dense_matrix(name: str, bias: bool, engine: str) -> None:
    torch.manual_seed(0)
    model = ComplexNet(name, bias).eval()
    x = torch.randn(4, 2, *[4] * (len(CONVOLUTIONS[name][1]) - 2), dtype=F64)
    made = model, nn.CrossEntropyLoss(), (x, torch.arange(4) % 3)
    limit = 1e-6 if engine == "difference" else 1e-12
    assert error(columns(fh.Hessian(*made, engine=engine)), dense(*made)) < limit


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=dtype, generator=generator).requires_grad_()


IMAGE = (2, 3, 5, 5)
# Calls that torch accepts or refuses; batch_norm takes mean, variance, weight and bias.
CALLS: dict[str, Callable[[], Tensor]] = {
    "complex": lambda: F.conv2d(normal(*IMAGE, dtype=C128), normal(4, 3, 3, 3, dtype=C128)),
    "complex input": lambda: F.conv2d(normal(*IMAGE, dtype=C128), normal(4, 3, 3, 3)),
    "complex weight": lambda: F.conv2d(normal(*IMAGE), normal(4, 3, 3, 3, dtype=C128)),
    "two dtypes": lambda: F.conv2d(normal(*IMAGE), normal(4, 3, 3, 3, dtype=F64)),
    "another dtype of bias": lambda: F.conv2d(
        normal(*IMAGE), normal(4, 3, 3, 3), normal(4, dtype=F64)
    ),
    "integers": lambda: F.conv2d(
        torch.ones(*IMAGE, dtype=torch.int32), torch.ones(4, 3, 3, 3, dtype=torch.int32)
    ),
    "stride of NumPy": lambda: F.conv2d(
        normal(*IMAGE),
        normal(4, 3, 3, 3),
        stride=np.int64(2),  # type: ignore[arg-type]
    ),
    "too many strides": lambda: F.conv2d(normal(*IMAGE), normal(4, 3, 3, 3), stride=(1, 1, 1)),
    "no batch": lambda: F.conv2d(normal(3, 5, 5), normal(4, 3, 3, 3)),
    "one mean for all": lambda: F.batch_norm(normal(*IMAGE), torch.zeros(1), torch.ones(1)),
    "one weight for all": lambda: F.batch_norm(
        normal(*IMAGE), torch.zeros(3), torch.ones(3), torch.ones(1), torch.ones(1)
    ),
    "a mean of two dimensions": lambda: F.batch_norm(
        normal(*IMAGE), torch.zeros(1, 3), torch.ones(1, 3)
    ),
    "a norm in two dtypes": lambda: F.batch_norm(
        normal(*IMAGE), torch.zeros(3), torch.ones(3), torch.ones(3, dtype=F64)
    ),
    "a norm of a vector": lambda: F.batch_norm(normal(3), torch.zeros(3), torch.ones(3)),
    "a weight norm in two dtypes": lambda: torch._weight_norm(normal(4, 3), normal(4, 1).double()),
}


@pytest.mark.parametrize("name", CALLS)
def test_replacements_accept_and_refuse_what_torch_does(name: str) -> None:
    found: list[Tensor | type[Exception]] = []
    for rewritten in (False, True):
        try:
            if rewritten:
                with Patches():
                    found.append(CALLS[name]())
            else:
                found.append(CALLS[name]())
        except (RuntimeError, TypeError) as error:
            found.append(type(error))
    torch_own, ours = found
    if isinstance(torch_own, Tensor) and isinstance(ours, Tensor):
        torch.testing.assert_close(ours, torch_own)
    else:
        assert ours == torch_own


@pytest.mark.parametrize("engine", EACH_ENGINE)
@pytest.mark.parametrize("dim", [0, 1, None])
def test_weight_norm_over_any_dimension(dim: int | None, engine: str) -> None:
    """The reference is the formula in torch operations; dim=None normalises over all numbers."""
    torch.manual_seed(0)
    model = nn.Sequential(weight_norm(nn.Linear(3, 4), dim=dim), nn.Tanh(), nn.Linear(4, 2))
    made = model.double(), nn.MSELoss(), (torch.randn(5, 3, dtype=F64), torch.randn(5, 2).double())

    class Formula(nn.Module):
        def forward(self, g: Tensor, v: Tensor) -> Tensor:
            over = None if dim is None else 1 - dim
            return v * (g / v.square().sum(over, keepdim=dim is not None).sqrt())

    H = columns(fh.Hessian(*made, engine=engine))
    model[0].parametrizations.weight[0].forward = Formula().forward
    assert error(H, dense(*made)) < (1e-6 if engine == "difference" else 1e-12)


CRITERIA: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "weight": lambda z, y: F.mse_loss(z, y, weight=y.square()),
    "weight, sum": lambda z, y: F.mse_loss(z, y, reduction="sum", weight=y.square()),
    "no reduction": lambda z, y: F.mse_loss(z, y, reduction="none").mean(),
    "another dtype": lambda z, y: F.mse_loss(z, y.float()),
    "the other way round": lambda z, y: F.mse_loss(input=y, target=z),
}


@pytest.mark.parametrize("engine", EACH_ENGINE)
@pytest.mark.parametrize("name", CRITERIA)
def test_the_squared_error_with_any_arguments(name: str, engine: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    data = torch.randn(5, 3, dtype=F64), torch.randn(5, 2, dtype=F64)
    H = columns(fh.Hessian(model, CRITERIA[name], data, engine=engine, weights=[1.0]))
    limit = 1e-6 if engine == "difference" else 1e-12
    assert error(H, dense(model, CRITERIA[name], data)) < limit
