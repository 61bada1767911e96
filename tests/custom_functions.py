"""Custom autograd functions: those that double backward gets wrong, and good ones, in small models.

Each wrong one has a plain twin, made of torch's operations, whose dense Hessian is what is wanted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
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


class Net(nn.Module):
    """Linear, a function, linear."""

    def __init__(self, f: Callable[..., Any], scaled: bool = False) -> None:
        super().__init__()
        self.first, self.last, self.f = nn.Linear(3, 4), nn.Linear(4, 3), f
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 4)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        return self.last(self.f(z) if self.scale is None else self.f(z, self.scale))


class ReluConvNet(nn.Module):
    """Convolutions with ReLU around a function."""

    def __init__(self, f: Callable[..., Any]) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
        self.conv2, self.head, self.f = nn.Conv2d(6, 6, 3), nn.Linear(6, 3), f

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm(self.conv1(x.view(-1, 1, 8, 8))))
        return self.head(torch.relu(self.conv2(self.f(x))).mean((2, 3)))


class Checkpointed(nn.Module):
    """Two blocks that are run again in the backward pass."""

    def __init__(self, f: Callable[..., Any]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(lambda t, b=block: self.f(b(t)), x, use_reentrant=False)
        return x


class Loop(nn.Module):
    """A recurrent cell from a state of zeros."""

    def __init__(self, f: Callable[..., Any]) -> None:
        super().__init__()
        self.inp, self.head, self.f = nn.Linear(3, 3), nn.Linear(3, 3), f
        self.W = nn.Parameter(0.4 * torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x)
        for _ in range(20):
            h = self.f(self.inp(x), h, self.W)
        return self.head(h)


class Flow(nn.Module):
    """A flow whose field is a network, solved by a function."""

    def __init__(self, adjoint: bool) -> None:
        super().__init__()
        self.field = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
        self.head, self.adjoint = nn.Linear(3, 3), adjoint

    def forward(self, x: Tensor) -> Tensor:
        h = self.head(x)
        if self.adjoint:
            return Adjoint.apply(self.field, h, *self.field.parameters())
        for _ in range(10):
            h = h + 0.1 * self.field(h)
        return h


class Headed(nn.Module):
    """A model that returns the loss of its head, as a function of features and weights."""

    def __init__(self, f: Callable[..., Any], bias: bool = True) -> None:
        super().__init__()
        self.body, self.head, self.f = nn.Linear(3, 4), nn.Linear(4, 3, bias=bias), f

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = torch.tanh(self.body(x))
        return 0.5 * self.f(h, self.head.weight, y, self.head.bias)


def cube(x: Tensor) -> Tensor:
    return x**3


def linear_loss(x: Tensor, W: Tensor, y: Tensor, b: Tensor | None = None) -> Tensor:
    return F.cross_entropy(F.linear(x, W, b), y)


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


def _assigned(x: Tensor) -> Tensor:
    into = torch.empty(2, *x.shape, dtype=x.dtype)
    for at in range(2):
        into = Assigned.apply(into, x * (at + 1), at)
    return into.sum(0).tanh()


class Inner(Function):
    """The square root, with a constant from a function without a second derivative."""

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


def _by_func(x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.grad(lambda t: t.pow(3).sum()))(x)


GOOD = {
    "swish": lambda: Net(Good.apply),
    "straight through": lambda: Net(Straight.apply),
    "ReLU": lambda: Net(Kinked.apply),
    "ReLU of images": lambda: ReluConvNet(Kinked.apply),
    "binary": lambda: Net(Signed.apply),
    "in place": lambda: Net(lambda x: Exponential.apply(x * 1)),
    "gradient reversed": lambda: Net(lambda x: Reversed.apply(x, 0.3).tanh()),
    "gradient clipped": lambda: Net(lambda x: Clipped.apply(x).tanh()),
    "dropout": lambda: Net(Dropped.apply),
    "maxima": lambda: Net(lambda x: x * Largest.apply(x)[0]),
    "logarithm": lambda: Net(lambda x: Logarithm.apply(x.square() + 1e-4)),
    "assignment": lambda: Net(_assigned),
    "square root": lambda: Net(Inner.apply),
    "an operation of a library": lambda: Net(square_op),
    "torch.func inside": lambda: Net(_by_func),
    "checkpoint": lambda: Checkpointed(Good.apply),
    "a loop": lambda: Loop(lambda x, h, W: Good.apply(x + h @ W)),
    "spectral norm": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 3)
    ),
}


class Planted(NamedTuple):
    """A model with a function that double backward gets wrong, and its plain twin."""

    wrong: Callable[[], nn.Module]
    plain: Callable[[], nn.Module]
    criterion: Any = F.cross_entropy
    plain_criterion: Any = F.cross_entropy
    width: int = 3  # of the inputs


def _pair(wrong: Any, plain: Any, net: Callable[..., nn.Module] = Net, **options: Any) -> Planted:
    width = 64 if net is ReluConvNet else 3
    return Planted(
        functools.partial(net, wrong, **options), functools.partial(net, plain, **options),
        width=width,
    )  # fmt: skip


def _two(f: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
    def both(x: Tensor) -> Tensor:
        s, c = f(x)
        return s * c + s

    return both


def _own(net: Any, *made: Any) -> Planted:
    wrong, plain = made
    return Planted(
        functools.partial(net, wrong), functools.partial(net, plain), None, None,
    )  # fmt: skip


def _linear() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))


PLANTED = {
    "backward under no_grad": _pair(NoGrad.apply, cube),
    "context set up apart, detached": _pair(SetUp.apply, cube),
    "outside of torch": _pair(Numpy.apply, cube),
    "one of two inputs missing": _pair(Partly.apply, lambda x, s: x**2 * s**2, scaled=True),
    "a wrong factor": _pair(Factor.apply, cube),
    "two outputs": _pair(_two(SineCosine.apply), _two(lambda x: (x.sin(), x.cos()))),
    "softmax": _pair(Softmax.apply, lambda x: x.softmax(-1)),
    "decorators of mixed precision": _pair(Mixed.apply, cube),
    "an operation of a library": _pair(cube_op, cube),
    "among ReLU and convolutions": _pair(Swish.apply, F.silu, ReluConvNet),
    "in a checkpointed block": _pair(Swish.apply, F.silu, Checkpointed),
    "in a loop, from zeros": _pair(Cell.apply, lambda x, h, W: torch.tanh(x + h @ W), Loop),
    "an adjoint that reads a module": Planted(lambda: Flow(True), lambda: Flow(False)),
    "gradient in forward": Planted(_linear, _linear, FusedLoss.apply),
    "gradient over the logits": Planted(_linear, _linear, InPlaceLoss.apply),
    "fused linear and loss": _own(Headed, FusedLinearLoss.apply, linear_loss),
    "fused linear and loss, no bias": _own(
        functools.partial(Headed, bias=False), FusedLinearLoss.apply, linear_loss
    ),
}


def planted(name: str, dtype: torch.dtype, seed: int = 0) -> tuple[Any, Any, Any]:
    """(model, criterion, data) with the function, its twin with the same numbers, and its loss."""
    case = PLANTED[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrong, plain = case.wrong(), case.plain()
        plain.load_state_dict(wrong.state_dict())
        x, y = torch.randn(9, case.width), torch.randint(3, (9,))
    made = wrong.to(dtype).eval(), case.criterion, (x.to(dtype), y)
    return made, (plain.to(dtype).eval(), case.plain_criterion), (x.to(dtype), y)
