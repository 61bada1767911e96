"""Wrapped models have the matrix of the module inside; models may mix float dtypes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fasthessian as fh
from tests.support.models import (
    EACH_ENGINE,
    PROBLEMS,
    columns,
    dense,
    error,
    gauss_newton,
    mismatch,
    refused,
)

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
each_engine = pytest.mark.parametrize("engine", EACH_ENGINE)


def bound(engine: str) -> float:
    """The error bound of test_engine_table.py: of central differences in float64, or rounding."""
    return 1e-6 if engine == "difference" else 1e-10


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="aot_eager")  # aot_eager has no double backward


WRAPPERS: dict[str, tuple[str, Callable[[nn.Module], Any]]] = {
    "DataParallel": ("module.", nn.DataParallel),
    "compiled": ("_orig_mod.", compiled),
    "DistributedDataParallel": ("module.", DistributedDataParallel),
    "compiled DistributedDataParallel": (
        "_orig_mod.module.", lambda model: compiled(DistributedDataParallel(model)),
    ),
    "DataParallel of a compiled one": (
        "module._orig_mod.", lambda model: nn.DataParallel(compiled(model)),
    ),
}  # fmt: skip


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapper_gives_the_matrix_of_the_module_inside(name: str) -> None:
    prefix, wrap = WRAPPERS[name]
    model, criterion, data = PROBLEMS["mlp"].make()
    want, plain = dense(model, criterion, data), fh.Hessian(model, criterion, data)
    wrapped = wrap(model)
    for engine in EACH_ENGINE:
        A = fh.Hessian(wrapped, criterion, data, engine=engine)
        assert mismatch(A, want) < bound(engine)
        assert "unwrapped" in A.engine and "unwrapped" not in plain.engine
        assert A.layout.names == plain.layout.names
        assert list(A.blocks("layer")) == ["0", "2"]
        G = fh.GaussNewton(wrapped, criterion, data, engine=engine)
        assert mismatch(G, gauss_newton(model, criterion, data)) < bound(engine)
    for chosen in ([f"{prefix}2.weight"], ["2.weight"], [model[2].weight]):
        A = fh.Hessian(wrapped, criterion, data, params=chosen)
        assert list(A.unflatten(torch.zeros(18, dtype=F64))) == ["2.weight"]
        assert error(columns(A), want[36:54, 36:54]) < 1e-12


# Dtypes


class Mixed(nn.Module):
    """The first layer has another precision than the last."""

    def __init__(self, first: torch.dtype, last: torch.dtype) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6).to(first), nn.Linear(6, 3).to(last)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x.to(self.first.weight.dtype)))
        return self.last(x.to(self.last.weight.dtype))


@each_engine
@pytest.mark.parametrize("last", [BF16, F32], ids=str)
def test_half_precision_parameters_have_operators_in_float32(
    last: torch.dtype, engine: str
) -> None:
    """bfloat16 has 8 bits: each factor is rounded by 4e-3, a product by a few times as much."""
    torch.manual_seed(0)
    model = Mixed(BF16, last)
    x, y = torch.randn(12, 5).bfloat16(), torch.randint(3, (12,))
    double = copy.deepcopy(model).double()
    for curvature, exact in ((fh.Hessian, dense), (fh.GaussNewton, gauss_newton)):
        A = curvature(model, nn.CrossEntropyLoss(), (x, y), engine=engine)
        assert A.dtype is F32 and A.n == 57
        made = mismatch(A, exact(double, nn.CrossEntropyLoss(), (x.double(), y)))
        assert made < (0.1 if engine == "difference" else 0.02)
        assert A.theta().dtype is F32
        assert {p.dtype for p in model.parameters()} == {BF16, last}
        assert all(B.dtype is F32 for B in A.blocks("layer").values())


def test_double_and_single_precision_do_not_mix() -> None:
    data = torch.randn(4, 5), torch.randint(3, (4,))
    for curvature in (fh.Hessian, fh.GaussNewton, fh.EmpiricalFisher, fh.Fisher):
        refused(
            lambda c=curvature: c(Mixed(F64, F32), nn.CrossEntropyLoss(), data),
            ValueError, "parameters mix dtypes",
        )  # fmt: skip
