"""Small models around custom autograd functions, wrong ones and good ones.

Each wrong one has a plain twin, made of torch's operations, whose dense Hessian is what is wanted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from tests.support.custom_good import (
    Clipped,
    Dropped,
    Exponential,
    Good,
    Inner,
    Kinked,
    Largest,
    Logarithm,
    Reversed,
    Signed,
    Straight,
    assigned,
    by_func,
    square_op,
)
from tests.support.custom_wrong import (
    Adjoint,
    Cell,
    Factor,
    FusedLinearLoss,
    FusedLoss,
    InPlaceLoss,
    Mixed,
    NoGrad,
    Numpy,
    Partly,
    SetUp,
    SineCosine,
    Softmax,
    Swish,
    cube_op,
)

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


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
    "assignment": lambda: Net(assigned),
    "square root": lambda: Net(Inner.apply),
    "an operation of a library": lambda: Net(square_op),
    "torch.func inside": lambda: Net(by_func),
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
        model, twin = case.wrong(), case.plain()
        twin.load_state_dict(model.state_dict())
        x, y = torch.randn(9, case.width), torch.randint(3, (9,))
    made = model.to(dtype).eval(), case.criterion, (x.to(dtype), y)
    return made, (twin.to(dtype).eval(), case.plain_criterion), (x.to(dtype), y)


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
    return torch.cat([
        torch.cat([block.reshape(p.numel(), -1) for block in row], 1)
        for p, row in zip(values, rows, strict=True)
    ])  # fmt: skip


def twins(wrong: Any, plain: Any, **options: Any) -> tuple[nn.Module, nn.Module, Any]:
    """Two networks with the same numbers, and data."""
    torch.manual_seed(0)
    one, two = Net(wrong, **options).double(), Net(plain, **options).double()
    two.load_state_dict(one.state_dict())
    return one, two, (torch.randn(9, 3, dtype=F64), torch.randint(3, (9,)))
