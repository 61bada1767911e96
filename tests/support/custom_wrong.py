"""Custom autograd functions whose second derivative is wrong, without an error by torch."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Function = torch.autograd.Function


class NoGrad(Function):
    """x^3 with its backward under no_grad."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            return g * 3 * x * x


class SetUp(Function):
    """x^3, its context set up apart; the backward detaches what it reads."""

    @staticmethod
    def forward(x: Tensor, power: int = 3) -> Tensor:
        return x**power

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g * 3 * ctx.saved_tensors[0].detach() ** 2, None


class Numpy(Function):
    """x^3 outside of torch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.x = x.detach().numpy().copy()
        return torch.from_numpy(ctx.x**3)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(3 * g.detach().numpy() * ctx.x**2))


class Partly(Function):
    """x^2 s^2 for a vector s; the gradient of s has no graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, s: Tensor) -> Tensor:
        ctx.save_for_backward(x, s)
        return x**2 * s**2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, s = ctx.saved_tensors
        return 2 * g * x * s**2, (2 * g * x**2 * s).sum(0).detach()


class _Factor(Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor) -> Tensor:
        ctx.save_for_backward(g, x)
        return 3 * g * x**2

    @staticmethod
    def backward(ctx: Any, c: Tensor) -> tuple[Tensor, Tensor]:
        g, x = ctx.saved_tensors
        return 3 * c * x**2, 3 * c * g * x  # for 6 c g x


class Factor(Function):
    """x^3, whose second derivative is half of what it should be."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return _Factor.apply(g, ctx.saved_tensors[0])


class SineCosine(Function):
    """Two outputs, the gradient without a graph."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x)
        return x.sin(), x.cos()

    @staticmethod
    def backward(ctx: Any, gs: Tensor, gc: Tensor) -> Tensor:
        x = ctx.saved_tensors[0].detach()
        return gs.detach() * x.cos() - gc.detach() * x.sin()


class Softmax(Function):
    """A Jacobian that is symmetric and not diagonal."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        p = x.softmax(-1)
        ctx.save_for_backward(p)
        return p

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        with torch.no_grad():
            p = ctx.saved_tensors[0]
            return p * (g - (p * g).sum(-1, keepdim=True))


class Swish(Function):
    """x sigmoid(x), the gradient from a detached formula."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x.sigmoid()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        x = ctx.saved_tensors[0].detach()
        s = x.sigmoid()
        return g * (s * (1 + x * (1 - s)))


class Cell(Function):
    """tanh(x + h W) with a graph that lacks W."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, h: Tensor, W: Tensor) -> Tensor:
        y = torch.tanh(x + h @ W)
        ctx.save_for_backward(h, W, y)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, W, y = ctx.saved_tensors
        with torch.no_grad():
            g = g * (1 - y * y)
            return g, g @ W.t(), h.t() @ g


class FusedLoss(Function):
    """Cross-entropy with the gradient made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            own = z.detach().requires_grad_()
            loss = F.cross_entropy(own, y)
            (g,) = torch.autograd.grad(loss, own)
        ctx.save_for_backward(g)
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * g, None


class InPlaceLoss(Function):
    """Cross-entropy whose gradient overwrites the logits, and is scaled where it lies."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(z, y)
        with torch.no_grad():
            z.data.copy_((z.softmax(1) - F.one_hot(y, z.shape[1])) / len(z))
        ctx.save_for_backward(z.detach())
        return loss

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0].mul_(g), None


class FusedLinearLoss(Function):
    """Cross-entropy of x W' + b in chunks of rows, all gradients made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, y: Tensor, b: Tensor | None = None) -> Tensor:
        gx, gW = torch.zeros_like(x), torch.zeros_like(W)
        gb = None if b is None else torch.zeros_like(b)
        total = x.new_zeros(())
        for rows in torch.arange(len(x)).split(3):
            z = x[rows] @ W.t() if b is None else x[rows] @ W.t() + b
            total += F.cross_entropy(z, y[rows], reduction="sum") / len(x)
            dz = (z.softmax(1) - F.one_hot(y[rows], len(W))) / len(x)
            gx[rows] = dz @ W
            gW += dz.t() @ x[rows]
            if gb is not None:
                gb += dz.sum(0)
        ctx.save_for_backward(gx, gW, gb)
        return total

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        gx, gW, gb = ctx.saved_tensors
        if g != 1:
            gx, gW = gx.mul_(g), gW.mul_(g)
            gb = None if gb is None else gb.mul_(g)
        return gx, gW, None, gb


class Adjoint(Function):
    """Ten Euler steps of h' = f(h) for a module f, which is read as it is, with an adjoint."""

    @staticmethod
    def forward(ctx: Any, f: nn.Module, h: Tensor, *params: Tensor) -> Tensor:
        ctx.f = f
        states = [h]
        for _ in range(10):
            states.append(states[-1] + 0.1 * f(states[-1]))
        ctx.save_for_backward(*states[:-1], *params)
        return states[-1]

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        states, params = ctx.saved_tensors[:10], ctx.saved_tensors[10:]
        sums = [torch.zeros_like(p) for p in params]
        for h in reversed(states):
            with torch.enable_grad():
                own = h.detach().requires_grad_()
                step = own + 0.1 * ctx.f(own)
                found = torch.autograd.grad(step, (own, *params), g)
            g = found[0]
            sums = [a + b for a, b in zip(sums, found[1:], strict=True)]
        return None, g, *sums


class Mixed(Function):
    """x^3 under the decorators of mixed precision."""

    @staticmethod
    @functools.partial(torch.amp.custom_fwd, device_type="cpu")
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @functools.partial(torch.amp.custom_bwd, device_type="cpu")
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * 3 * ctx.saved_tensors[0].detach() ** 2


class Rounded(Function):
    """A straight-through estimator: its gradient is no derivative, and is a constant."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        with torch.no_grad():
            return g.clone()


@torch.library.custom_op("fasthessian_tests::cube", mutates_args=())
def cube_op(x: Tensor) -> Tensor:
    """x^3 as an operation of a library."""
    return x**3


def _cube_setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])


def _cube_backward(ctx: Any, g: Tensor) -> Tensor:
    with torch.no_grad():
        return 3 * g * ctx.saved_tensors[0] ** 2


cube_op.register_autograd(_cube_backward, setup_context=_cube_setup)
