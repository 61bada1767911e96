"""Custom autograd functions written as torch's manual says: double backward is right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Function = torch.autograd.Function


class Straight(Function):
    """Rounding with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


class Kinked(Function):
    """ReLU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (ctx.saved_tensors[0] > 0)


class Signed(Function):
    """A binary activation with the gradient of a hard tanh."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sign()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * (ctx.saved_tensors[0].abs() < 1)


class Good(Function):
    """Swish, written as the manual says."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = x.sigmoid()
        return g * (s * (1 + x * (1 - s)))


class Exponential(Function):
    """exp(x) in place, from its output."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.exp_()
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0]


class Reversed(Function):
    """The gradient turned round and scaled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, by: float) -> Tensor:
        ctx.by = by
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return -ctx.by * g, None


class Clipped(Function):
    """The gradient clipped, so that b is not linear in u."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clamp(-0.05, 0.05)


class Dropped(Function):
    """Dropout with a mask of its own."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        mask = (torch.rand_like(x) < 0.7).to(x)
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0]


class Largest(Function):
    """Maxima, and where they are, which has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        values, at = x.max(1, keepdim=True)
        ctx.mark_non_differentiable(at)
        ctx.save_for_backward(at)
        ctx.width = x.shape[1]
        return values, at

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> Tensor:
        return g.new_zeros(len(g), ctx.width).scatter(1, ctx.saved_tensors[0], g)


class Logarithm(Function):
    """log(x) of what may be close to 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.log()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g / ctx.saved_tensors[0]


class Assigned(Function):
    """Writes into memory that may hold anything, past the counter of versions."""

    @staticmethod
    def forward(ctx: Any, into: Tensor, x: Tensor, at: int) -> Tensor:
        ctx.at = at
        into.data[at] = x
        return into

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:
        return g, g[ctx.at], None


def assigned(x: Tensor) -> Tensor:
    into = torch.empty(2, *x.shape, dtype=x.dtype)
    for at in range(2):
        into = Assigned.apply(into, x * (at + 1), at)
    return into.sum(0).tanh()


class Inner(Function):
    """sqrt(x^2 + 1)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = (x * x + 1).sqrt()
        ctx.save_for_backward(x)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return g * x / (x * x + 1).sqrt()


@torch.library.custom_op("fasthessian_tests::square", mutates_args=())
def square_op(x: Tensor) -> Tensor:
    """x^2 as an operation of a library, as good as torch's."""
    return x * x


square_op.register_autograd(
    lambda ctx, g: 2 * g * ctx.saved_tensors[0],
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


def by_func(x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.grad(lambda t: t.pow(3).sum()))(x)
