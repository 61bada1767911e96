"""A model that asks for more memory than there is, when told to."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn


class Hungry(nn.Module):
    """Asks for 4 PiB in its forward or in the derivative of its backward, when told to."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.when, self.seen = inner, "never", []

    def forward(self, x: Tensor) -> Tensor:
        out = torch.tanh(self.inner(x))
        self.seen.append(weakref.ref(out))
        if self.when == "forward":
            torch.empty(1 << 50)
        return Eater.apply(out, self) * out


class Eater(torch.autograd.Function):
    """x^2, by a backward that may run out of memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, owner: Hungry) -> Tensor:
        ctx.save_for_backward(x)
        ctx.owner = owner
        return x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if ctx.owner.when == "backward":
            torch.empty(1 << 50)
        return 2 * grad * ctx.saved_tensors[0], None
