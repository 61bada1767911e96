"""The dense Hessian of any loss of a model, and a loss over targets of which some are missing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.support.models import columns

F64 = torch.float64
NAN = float("nan")


def dense(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Tensor:
    """The Hessian of ``loss(model)``."""
    named = dict(model.named_parameters())

    def of(*values: Tensor) -> Tensor:
        class Moved(nn.Module):
            def forward(self, *inputs: Any, **more: Any) -> Any:
                return functional_call(model, dict(zip(named, values, strict=True)), inputs, more)

        return loss(Moved())

    at = tuple(p.detach() for p in named.values())
    blocks = torch.autograd.functional.hessian(of, at)
    sizes = [p.numel() for p in at]
    return torch.cat(
        [
            torch.cat([b.reshape(m, n) for b, n in zip(row, sizes, strict=True)], 1)
            for row, m in zip(blocks, sizes, strict=True)
        ]
    )


def distance(A: Any, want: Tensor) -> float:
    return float((columns(A) - want).norm() / want.norm())


def known_only(z: Tensor, y: Tensor) -> Tensor:
    return (z - y)[~y.isnan()].square().mean()
