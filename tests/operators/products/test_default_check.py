"""The check of second derivatives in every operator: it refuses wrong ones and no right ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import _SingleLevelFunction

import fasthessian as fh
from tests.support.custom_good import Good
from tests.support.custom_models import BF16, F32, F64, GOOD, cube, dense, planted, twins
from tests.support.custom_wrong import FusedLoss, NoGrad
from tests.support.models import columns, error, gauss_newton, mismatch, refused


def _unseen(function: Any) -> Any:
    """A call of the function that bypasses all checks."""
    return super(_SingleLevelFunction, function).apply


def test_nodes_without_a_check_are_compared_with_differences() -> None:
    model, plain, data = twins(_unseen(NoGrad), cube)
    for curvature in (fh.Hessian, fh.GaussNewton):
        refused(lambda c=curvature: c(model, F.cross_entropy, data), RuntimeError, "of NoGrad in")
        refused(lambda c=curvature: c(plain, _unseen(FusedLoss), data), RuntimeError, "FusedLoss")
    H = fh.Hessian(model, F.cross_entropy, data, engine="difference")
    assert mismatch(H, dense(plain, F.cross_entropy, data)) < 1e-6
    good, plain, data = twins(_unseen(Good), F.silu)
    for curvature, want in ((fh.Hessian, dense), (fh.GaussNewton, gauss_newton)):
        H = curvature(good, F.cross_entropy, data)
        assert error(columns(H), want(plain, F.cross_entropy, data)) < 1e-12
        assert "derivative" not in H.engine
    model, _, data = twins(_unseen(NoGrad), cube)
    for made in (model.float(), data[0].float(), data[1]), (model.bfloat16(), *data):
        made = made[0], F.cross_entropy, (made[1].to(next(model.parameters()).dtype), made[2])
    H = fh.Hessian(*made)
    assert "second derivative of NoGrad is not checked in 16 bits" in H.engine


def test_a_captured_function_of_torch_that_is_wrong_is_refused() -> None:
    captured = torch._weight_norm

    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.v, self.g = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.rand(4, 1) + 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(x @ captured(self.v, self.g, 0).t())

    torch.manual_seed(0)
    made = Normed().double(), F.cross_entropy, (torch.randn(6, 3, dtype=F64), torch.arange(6) % 4)
    refused(lambda: fh.Hessian(*made), RuntimeError, "WeightNormInterfaceBackward0")


def test_forward_mode_is_compared_where_functions_are_custom() -> None:
    """torch.func silently gives the function of a library a tangent of zeros."""
    made, _, _ = planted("an operation of a library", F64)
    refused(lambda: fh.GaussNewton(*made, engine="forward"), RuntimeError, "cube_default .*engine=")


@pytest.mark.parametrize("dtype", [F64, F32, BF16], ids=str)
@pytest.mark.parametrize("name", GOOD)
def test_right_functions_are_accepted(name: str, dtype: torch.dtype) -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        model, width = GOOD[name]().to(dtype), 64 if "images" in name else 3
        data = torch.randn(33, width, dtype=dtype), torch.randint(3, (33,))
        for curvature in (fh.Hessian, fh.GaussNewton):
            made = curvature(model, F.cross_entropy, data)
            assert "derivative" not in made.engine, made.engine
            if name == "swish":
                model.f = F.silu
                plain = curvature(model, F.cross_entropy, data)
                model.f = Good.apply
                assert error(columns(made), columns(plain).double()) < (
                    1e-12 if dtype is F64 else 1e-5 if dtype is F32 else 2e-2
                )
