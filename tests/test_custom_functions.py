"""Custom autograd functions that double backward gets wrong: the matrices are those of plain torch.

Local central differences err by about eps^(2/3), relative to third derivatives: 4e-11 in float64,
2e-5 in float32. 1e-6 and 1e-2 leave the factors that the table of engines leaves.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from custom_functions import F64, PLANTED, planted
from models import columns, error
from torch import Tensor, nn
from torch.func import functional_call

import fasthessian as fh


def dense(model: nn.Module, criterion: Any, data: tuple[Tensor, Tensor]) -> Tensor:
    """The Hessian by plain torch, also of models that return their loss."""
    names = [name for name, _ in model.named_parameters()]
    x, y = data

    def loss(*values: Tensor) -> Tensor:
        held = dict(zip(names, values, strict=True))
        if criterion is None:
            return functional_call(model, held, (x, y))
        return criterion(functional_call(model, held, (x,)), y)

    values = tuple(model.parameters())
    rows = torch.autograd.functional.hessian(loss, values)
    return torch.cat(
        [
            torch.cat([b.reshape(p.numel(), -1) for b in row], 1)
            for p, row in zip(values, rows, strict=True)
        ]
    )


@pytest.mark.parametrize("engine", ["retained", "recompute"])
@pytest.mark.parametrize("name", PLANTED)
def test_the_hessian_is_that_of_plain_operations(name: str, engine: str) -> None:
    made, twin, data = planted(name, F64)
    H = fh.Hessian(*made, engine=engine)
    assert error(columns(H), dense(*twin, data)) < 1e-6
    assert "by central differences" in H.engine
    assert H.check().ok
